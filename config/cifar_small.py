# CIFAR-10 on a laptop: the best pictures that an hour or two of two CPU cores buys.
#   python train.py config/cifar_small.py
#   python sample.py --out_dir=out-cifar-small
# Works at half resolution (patch=2), predicts v along the cosine schedule, 3.0M weights. 40,000 steps took 2.0 hours at
# 200 pictures/s on two Intel Xeon cores with AMX, and gave the weights in weights/; two Zen 4 cores make about
# 150.
from ddpm import cpu_has_bfloat16

out_dir = "out-cifar-small"
dtype = "bfloat16" if cpu_has_bfloat16() else "auto"
schedule, objective = "cosine", "v"
patch, ch, ch_mult, num_res_blocks, attn_resolutions, dropout = 2, 64, (1, 2), 1, (8,), 0.0
batch_size, max_iters = 32, 40_000
lr, min_lr, warmup_iters, ema_decay = 1e-3, 2e-5, 200, 0.9995
eval_interval, eval_pictures, sample_interval = 1000, 1000, 2000
