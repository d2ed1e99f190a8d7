# Your own pictures: a folder of them, or of one sub-folder per class, or of shards. Time and final loss are yours.
#   python train.py config/folder.py --dataset=path/to/pictures
out_dir = "out-folder"
dataset = "pictures"
image_size = 32
schedule, objective = "cosine", "v"
patch, ch, ch_mult, num_res_blocks, attn_resolutions = 2, 64, (1, 2), 1, (8,)
batch_size, max_iters = 32, 12_000
lr, min_lr, warmup_iters, ema_decay = 1e-3, 2e-5, 200, 0.9995
eval_interval, eval_pictures, sample_interval = 1000, 1000, 2000
