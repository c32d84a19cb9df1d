"""OpenAI's gpt2-medium (350M) as it is, evaluated on OpenWebText."""

batch_size = 8
eval_iters = 500
eval_only = True
init_from = "gpt2-medium"
n_layer = 24
n_head = 16
n_embd = 1024
