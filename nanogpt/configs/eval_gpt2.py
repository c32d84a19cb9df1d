"""OpenAI's gpt2 (124M) as it is, evaluated on OpenWebText."""

batch_size = 8
eval_iters = 500
eval_only = True
init_from = "gpt2"
n_layer = 12
n_head = 12
n_embd = 768
