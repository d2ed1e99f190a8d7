# Flowers102 at 64x64, random resized crops and flips. A GPU is wanted. Time and final loss: not measured yet.
#   python train.py config/flowers102.py
out_dir = "out-flowers"
dataset, image_size = "flowers102", 64
crop = 0.7  # squares of 70 to 100% of the side, resized
patch, ch, ch_mult, num_res_blocks, attn_resolutions = 2, 128, (1, 2, 2), 2, (16, 8)
schedule, objective = "cosine", "v"
batch_size, max_iters, eval_interval, sample_interval = 64, 60_000, 1000, 5000
