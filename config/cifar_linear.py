# The default recipe: CIFAR-10, 38.3M weights, T=500, linear betas 1e-4 to 0.028, guidance learned with p_uncond=0.1.
#   python train.py config/cifar_linear.py
#   torchrun --nproc_per_node=gpu train.py config/cifar_linear.py
# Equal to the defaults in train.py, written out. Time and final loss on a GPU: not measured yet.
out_dir = "out"
dataset = "cifar10"
timesteps, schedule, beta_start, beta_end = 500, "linear", 1e-4, 0.028
objective, loss, weighting, p_uncond = "eps", "l2", "simple", 0.1
ch, ch_mult, num_res_blocks, attn_resolutions, dropout = 128, (1, 2, 2, 2), 2, (16,), 0.1
batch_size, max_iters, lr, ema_decay = 128, 200_000, 2e-4, 0.9999
