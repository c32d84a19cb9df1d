"""The network of shakespeare_cpu on all of Shakespeare's plays, a text that needs no download."""

out_dir = "out-plays-cpu"
eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False

wandb_project = "plays_char"
wandb_run_name = "mini-gpt-cpu"

dataset = "plays_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

device = "cpu"
