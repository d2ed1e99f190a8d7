"""A GPU, emulated on the CPU: where the tensors are, what is compiled, which device and type each process takes."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import augment_flags, train_flags
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import ddpm
import runtime

CONFIG = ddpm.DDPMConfig(image_size=8, num_classes=3, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))


@pytest.fixture
def fake_cuda(monkeypatch):
    """A mode in which CUDA tensors have types, devices and strides, but no values. Mixing devices is an error."""
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 has no fake CUDA tensors without a driver")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    return FakeTensorMode()


def on_fake_cuda(module, mode):
    """Moves a module onto the fake GPU, for bfloat16: its parameters and buffers lose their values."""
    module.amp_dtype = torch.bfloat16
    with mode:
        return module._apply(lambda v: torch.empty(v.shape, dtype=v.dtype, device="cuda"))


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that scripts compile, each for the whole network, and runs them eagerly."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compile_whole = functools.partialmethod(torch.nn.Module.compile, backend=counter, fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_whole)
    return counter


def test_attention_suits_the_fused_kernels(fake_cuda, monkeypatch):
    """They ask for rows without gaps; without them the maths runs in several kernels and in float32."""
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: seen.extend(qkv) or torch.empty_like(qkv[0]))
    attention = on_fake_cuda(ddpm.Attention(128), fake_cuda)
    with fake_cuda:
        attention(torch.empty(2, 128, 4, 4, device="cuda"))
    q, k, v = (torch.empty_strided(a.shape, a.stride()) for a in seen)
    assert torch._fused_sdp_choice(q, k, v) != torch._fused_sdp_choice(q.mT, k.mT, v.mT) == 0  # the plain maths


def test_activations_stay_in_16_bits(fake_cuda, monkeypatch):
    """Autocast would run GroupNorm in float32, which makes all that follows up to the next convolution float32."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: q * k * v)
    model, kept = on_fake_cuda(ddpm.DDPM(CONFIG), fake_cuda), []
    with fake_cuda:
        x, k = torch.empty(4, *model.shape, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
            model.network(x, k, k)
    maps = [v.dtype for v in kept if v.ndim == 4 and v.shape[0] in (1, 4) and v.shape[-1] > 3]  # not the kernels
    assert len(maps) > 20 and torch.float32 not in maps[1:]  # the first is the input


def test_training_and_samplers_stay_on_the_device(fake_cuda, graphs, monkeypatch):
    """And the network of all samplers is one graph, guided or not."""
    images, labels = np.zeros((9, 8, 8, 3), np.uint8), np.arange(9) % 3
    model = on_fake_cuda(ddpm.DDPM(CONFIG), fake_cuda)
    monkeypatch.setattr(model, "sampler_timesteps", lambda *_: [400, 100, 5])  # the fake tensors have no values
    monkeypatch.setattr(model, "check_sampling", lambda *_: None)
    monkeypatch.setattr(ddpm, "check", lambda *_: None)
    with fake_cuda:
        x0, y = data.Batches(images, labels, 4, 0, crop=0.8, shift=1, device="cuda")(0)
        t, eps = model.random_t_eps(4, device="cuda")
        losses = model(x0, model.drop_labels(y), t, eps)
        assert {v.device.type for v in (x0, y, t, eps, losses)} == {"cuda"} and losses.dtype == torch.float32
        model.net.compile(dynamic=False)
        for how in (dict(), dict(w=1.0, sampler="dpm++"), dict(w=1.0, interval=(0.5, 2.0), sampler="ddim", eta=0.5)):
            x = model.sample(y, indices=range(4), steps=3, **how)
            assert x.device.type == ddpm.to_uint8(x).device.type == "cuda"
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_train_compiles_one_graph_and_augment_one_more_for_the_guide(graphs, shards, trained, tmp_path, run):
    run("train", *train_flags(shards, tmp_path / "out", use_compile=True, sample_interval=3, grad_accum=2))
    assert graphs.frame_count == 1
    images = []
    for use_compile in (False, True):
        folder = f"{tmp_path}/{use_compile}"
        run("augment", *augment_flags(trained, folder, per_class=6, batch_size=6, use_compile=use_compile))
        images.append(data.read_shards(folder)[0].astype(int))
    assert graphs.frame_count == 1 + 2 and np.abs(images[0] - images[1]).max() <= 1


def test_device_type_and_compilation_of_each_process(monkeypatch):
    """A T4 at 0 and an A100 at 1: what is asked about the GPU is asked of the right one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: emulated or current[-1] == "cuda:1")
    t4, a100, compiled = ("cuda:0", torch.float16), ("cuda:1", torch.bfloat16), dict(dynamic=False)
    for triton in (None, "found"):
        monkeypatch.setattr(runtime, "find_spec", lambda name: triton)
        for device, rank, wanted in (("auto", 0, t4), ("auto", 1, a100), ("cuda", 1, a100), ("cuda:1", 0, a100)):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            how = compiled if triton else {}
            assert runtime.setup_device(device) == (*wanted, how) and current[-1] == wanted[0]
    assert runtime.setup_device("cuda:1", "float32", "False") == ("cuda:1", None, {})
    monkeypatch.delenv("LOCAL_RANK")  # srun and mpirun: two nodes of two GPUs
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, wanted in enumerate((t4, a100, t4, a100)):
        monkeypatch.setenv("RANK", str(rank))
        assert runtime.setup_device()[:2] == wanted
    with pytest.raises(ddpm.UserError, match="cuda:0 for every process"):
        runtime.setup_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ddpm.UserError, match=r"device: cuda:2 is not there \(GPUs: 2\)"):
        runtime.setup_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has_bfloat16, amp_dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
        assert runtime.setup_device("cpu") == ("cpu", amp_dtype, {})
    assert runtime.setup_device("cpu", "float16", "True") == ("cpu", torch.float16, compiled)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.setup_device("auto") == ("mps", None, {})


@pytest.mark.slow
def test_float16_survives_a_loss_that_overflows_and_learns(shards, tmp_path, run, fails, monkeypatch):
    network, calls = ddpm.DDPM.network, []

    def overflowing(self, *inputs):
        calls.append(self.training)
        overflows = (sum(calls) if self.training else "validation") in bad
        return network(self, *inputs) * (math.inf if overflows else 1)

    monkeypatch.setattr(ddpm.DDPM, "network", overflowing)
    how, bad = dict(dtype="float16", log_interval=20, eval_interval=30), {3}
    run("train", *train_flags(shards, tmp_path / "step", **how, max_iters=60))
    log, checkpoint = data.read_json(f"{tmp_path}/step/log.json"), ddpm.load_checkpoint(f"{tmp_path}/step/ckpt.pt")
    assert None not in log["log_loss"] and all(v.isfinite().all() for v in checkpoint["ema"].values())
    assert checkpoint["scaler"]["scale"] == 2**15  # halved once
    assert log["val_loss"][1] < log["val_loss"][0] and log["log_loss"][-1] < 0.9 * log["log_loss"][0]
    calls, bad = [], {"validation"}  # not hidden: there is no step to skip
    run("train", *train_flags(shards, tmp_path / "validation", **how))
    assert data.read_json(f"{tmp_path}/validation/log.json")["val_loss"] == [None]
    calls, bad = [], set(range(100))
    assert "at step 1, lr" in fails("train", *train_flags(shards, tmp_path / "all", **how))
