"""The kinds of device: what all share (base), Ascend 910, several CPUs or GPUs; npu_config.open_device picks among them."""
