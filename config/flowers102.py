# Flowers102 at 64x64. Needs a GPU. Time and loss: not measured yet.
#   python train.py config/flowers102.py
out_dir = "out-flowers"
dataset = "flowers102"
image_size = 64
crop = 0.7  # random squares of 70 to 100% of the side: the set has only 1,020 training images
patch = 2  # work at 32x32
ch = 128
ch_mult = (1, 2, 2)
num_res_blocks = 2
attn_resolutions = (16, 8)
schedule = "cosine"
objective = "v"
batch_size = 64
max_iters = 60_000
eval_interval = 1000
sample_interval = 5000
