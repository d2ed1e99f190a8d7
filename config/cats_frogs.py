# Two classes of CIFAR-10, with the network of cifar_small. Time and loss: not measured yet.
#   python train.py config/cats_frogs.py                                                           conditional
#   python train.py config/cats_frogs.py --classes=cat --conditional=False --out_dir=out-cats      only cats
out_dir = "out-cats-frogs"
classes = "cat,frog"
schedule = "cosine"
objective = "v"
patch = 2
ch = 64
ch_mult = (1, 2)
num_res_blocks = 1
attn_resolutions = (8,)
dropout = 0.1  # 43 epochs of few images
batch_size = 32
max_iters = 12_000
lr = 1e-3
min_lr = 2e-5
warmup_iters = 200
ema_decay = 0.9995
eval_interval = 1000
eval_images = 1000
sample_interval = 2000
