# Your own images: a folder of them, of one sub-folder per class, or of shards. Time and loss are yours.
#   python train.py config/folder.py --dataset=path/to/images
from configurator import cpu_has_bfloat16

out_dir = "out-folder"
dataset = "images"
image_size = 32
dtype = "bfloat16" if cpu_has_bfloat16() else "auto"
schedule = "cosine"
objective = "v"
patch = 2
ch = 64
ch_mult = (1, 2)
num_res_blocks = 1
attn_resolutions = (8,)
batch_size = 32
max_iters = 12_000
lr = 1e-3
min_lr = 2e-5
warmup_iters = 200
ema_decay = 0.9995
eval_interval = 1000
eval_images = 1000
sample_interval = 2000
