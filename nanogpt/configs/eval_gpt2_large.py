"""OpenAI's gpt2-large (774M) as it is, evaluated on OpenWebText."""

batch_size = 8
eval_iters = 500
eval_only = True
init_from = "gpt2-large"
n_layer = 36
n_head = 20
n_embd = 1280
