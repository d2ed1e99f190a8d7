# The quick start: ten classes of generated shapes, no download, minutes on two CPU cores.
#   python train.py config/shapes.py
#   python sample.py --out_dir=out-shapes
out_dir = "out-shapes"
dataset = "shapes"
schedule, objective = "cosine", "v"
patch, ch, ch_mult, num_res_blocks, attn_resolutions, dropout = 2, 32, (1, 2), 1, (8,), 0.0
hflip = False
batch_size, max_iters = 32, 1500
lr, min_lr, warmup_iters, ema_decay = 2e-3, 2e-5, 100, 0.995
eval_interval, eval_pictures, sample_interval, log_interval = 500, 500, 500, 50
