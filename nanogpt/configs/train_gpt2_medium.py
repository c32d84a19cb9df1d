"""GPT-2 medium (350M) on OpenWebText: as train_gpt2, with GPT-3's learning rate for this size."""

n_layer = 24
n_head = 16
n_embd = 1024

batch_size = 6
block_size = 1024
gradient_accumulation_steps = 80  # 6 * 1024 * 80 = 491,520 tokens

learning_rate = 3e-4
min_lr = learning_rate / 10
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1

out_dir = "out-gpt2-medium"
wandb_project = "owt"
wandb_run_name = "gpt2-medium"
