# The default recipe on the cosine schedule of Nichol & Dhariwal, for comparison with cifar_linear.
#   python train.py config/cifar_cosine.py
# Time and final loss on a GPU: not measured yet.
out_dir = "out-cifar-cosine"
schedule = "cosine"
