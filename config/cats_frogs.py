# Two classes of CIFAR-10, at the size of cifar_small. Time and final loss: not measured yet.
#   python train.py config/cats_frogs.py                                                   conditional cats and frogs
#   python train.py config/cats_frogs.py --classes=cat --conditional=False --out_dir=out-cats      unconditional cats
out_dir = "out-cats-frogs"
classes = "cat,frog"
schedule, objective = "cosine", "v"
patch, ch, ch_mult, num_res_blocks, attn_resolutions, dropout = 2, 64, (1, 2), 1, (8,), 0.1
batch_size, max_iters = 32, 12_000
lr, min_lr, warmup_iters, ema_decay = 1e-3, 2e-5, 200, 0.9995
eval_interval, eval_pictures, sample_interval = 1000, 1000, 2000
