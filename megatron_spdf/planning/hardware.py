"""Peak dense bf16 rates of GPUs, from their makers' data sheets, FLOP/s."""

PEAK_BF16 = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak of the GPU whose name contains a known one; None for any other device."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
