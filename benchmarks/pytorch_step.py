"""The same networks and train step in PyTorch, channels-last: what the step is measured against, where PyTorch is installed.

Knows nothing but PyTorch, so that it may run in an environment of its own (--torch_python). The networks are those of models.py;
initial values differ (PyTorch's own), and a convolution of stride 2 pads both sides where TensorFlow pads one: neither changes the
work. Weight decay is decoupled and for kernels only, Adam is the fused one, the moving average is one call for all weights.
"""
import copy
from typing import Any, Callable, Dict, Tuple

from benchmarks import workers

INSTALL = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


def networks(width: float) -> Tuple[Any, Any, Any]:
    """f, g and q of ResNet-18 BYOL at this width, as torch modules."""
    from torch import nn
    from torch.nn import functional as F

    def norm(channels: int, of: Any) -> Any:
        return of(channels, eps=1e-3, momentum=0.01)  # Keras's 0.99 is what it keeps

    class Block(nn.Module):
        def __init__(self, channels: int, filters: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1)
            self.norm1 = norm(filters, nn.BatchNorm2d)
            self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1)
            self.norm2 = norm(filters, nn.BatchNorm2d)
            self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride), norm(filters, nn.BatchNorm2d))

        def forward(self, x: Any) -> Any:
            y = F.relu(self.norm1(self.conv1(x)), inplace=True)
            return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)

    widths = [int(filters * width) for filters in (64, 128, 256, 512)]
    layers = [nn.Conv2d(3, widths[0], 3, 1, 1), norm(widths[0], nn.BatchNorm2d), nn.ReLU(inplace=True)]
    channels = widths[0]
    for stage, filters in enumerate(widths):
        for stride in (1 if stage == 0 else 2, 1):
            layers.append(Block(channels, filters, stride))
            channels = filters
    f = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def head(inputs: int) -> Any:
        return nn.Sequential(nn.Linear(inputs, 256), norm(256, nn.BatchNorm1d), nn.ReLU(inplace=True), nn.Linear(256, 128))

    return f, head(widths[-1]), head(128)


def parameters(network: Any) -> int:
    """How many trainable numbers a network has."""
    return sum(weight.numel() for weight in network.parameters())


def prepare(settings: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The child's jobs; without PyTorch only one, which says so."""
    try:
        import torch
    except ImportError:
        return {"warm_up": lambda: {"missing": "not installed (%s)" % INSTALL}}
    from torch.nn import functional as F

    torch.manual_seed(0)
    gpu = torch.cuda.is_available() and settings["device"] != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True  # as TensorFlow
    half = settings["precision_mode"] == "allow_mix_precision"
    f, g, q = (network.to(device, memory_format=torch.channels_last) for network in networks(settings["width"]))
    f_target, g_target = (copy.deepcopy(network).requires_grad_(False) for network in (f, g))
    online = [weight for network in (f, g, q) for weight in network.parameters()]
    groups = [{"params": [w for w in online if w.dim() > 1], "weight_decay": 1e-4},
              {"params": [w for w in online if w.dim() <= 1], "weight_decay": 0.0}]
    try:
        optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-7, fused=True)
    except (RuntimeError, TypeError):  # older ones have it for GPUs only
        optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-7)

    def state(*modules: Any) -> Any:
        return [value for module in modules for value in module.state_dict().values() if value.is_floating_point()]

    views = [torch.rand(settings["batch"], 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
             for _ in range(2)]

    def step(n: int) -> None:
        for _ in range(n):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                with torch.no_grad():
                    z1, z2 = (g_target(f_target(view)) for view in views)
                p1, p2 = (q(g(f(view))) for view in views)
            loss = 2 - 2 * F.cosine_similarity(torch.cat([p1, p2]).float(), torch.cat([z2, z1]).float()).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(state(f_target, g_target), state(f, g), 0.01)
        loss.item()

    def warm_up() -> Dict[str, Any]:
        step(1)
        return {"version": torch.__version__, "parameters": [parameters(network) for network in (f, g, q)]}

    return {"warm_up": warm_up, "step": lambda seconds: workers.seconds_each(step, seconds)}


if __name__ == "__main__":
    workers.serve(prepare)
