"""OpenAI's gpt2-xl (1558M) as it is, evaluated on OpenWebText."""

batch_size = 8
eval_iters = 500
eval_only = True
init_from = "gpt2-xl"
n_layer = 48
n_head = 25
n_embd = 1600
