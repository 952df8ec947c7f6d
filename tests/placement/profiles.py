"""A machine of round figures, for predictions worked by hand."""

from greenroom.placement.calibrate import MachineProfile

GPU = MachineProfile(
    fingerprint="f" * 16, name="cpu + gpu", date="-", threads=4, ram=64 << 30, gpu="gpu",
    vram_total=80 << 30, dram={4: 100.0}, experts={"X": 50.0}, dense={"X": 100.0},
    experts_batch={"X": 1000.0}, vram=1000.0, gpu_bf16=1e5, pcie_up={64: 50.0},
)  # fmt: skip
