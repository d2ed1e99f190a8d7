# CIFAR-10 on a laptop: 3.0M parameters, 40,000 steps of 32.
#   python train.py config/cifar_small.py
#   python sample.py --out_dir=out-cifar-small
# Took 2.0 hours at 200 images/s on two Intel Xeon cores with AMX: validation loss 0.107. Two Zen 4 cores: 150 images/s.
# The result is in weights/.
from configurator import cpu_has_bfloat16

out_dir = "out-cifar-small"
dtype = "bfloat16" if cpu_has_bfloat16() else "auto"  # twice as fast
schedule = "cosine"
objective = "v"  # Salimans & Ho: holds up better than eps with few sampling steps
patch = 2  # work at 16x16, a quarter of the cost
ch = 64
ch_mult = (1, 2)
num_res_blocks = 1
attn_resolutions = (8,)
dropout = 0.0  # 28 epochs do not overfit
batch_size = 32
max_iters = 40_000
lr = 1e-3  # small networks take a larger one
min_lr = 2e-5
warmup_iters = 200
ema_decay = 0.9995  # a shorter average for a shorter run
eval_interval = 1000
eval_images = 1000
sample_interval = 2000
