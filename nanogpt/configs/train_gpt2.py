"""GPT-2 124M on OpenWebText: 12 * 1024 * 40 = 491,520 tokens an update, over 1 to 40 GPUs."""

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000  # 295 billion tokens
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1

wandb_project = "owt"
wandb_run_name = "gpt2-124M"
