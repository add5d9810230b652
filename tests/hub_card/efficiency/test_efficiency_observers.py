import torch

from vreflection_hub_card.efficiency.observers import PeakMemory


CPU = torch.device("cpu")


def test_peak_memory_is_what_was_held_at_once():
    before = torch.zeros(2_000_000)
    with PeakMemory(CPU) as memory:
        one = torch.empty(1_000_000)  # 4 MB
        three = torch.empty(3, 1_000_000)  # 16 MB together: the peak
        del one, before  # what was held before doesn't count
        two = torch.empty(2_000_000)  # 20 MB together: a higher one
        del three
        torch.empty(1_000_000)  # 12 MB
    assert 20_000_000 <= memory.bytes < 20_010_000
    with PeakMemory(CPU) as second:  # whatever the first context left
        torch.empty(1_000_000)
    assert 4_000_000 <= second.bytes < 4_010_000
    assert two.numel() == 2_000_000


def test_peak_memory_of_a_backward_pass():
    layer = torch.nn.Linear(1000, 500, bias=False)
    inputs = torch.randn(200, 1000)
    with PeakMemory(CPU) as memory:
        layer(inputs).sum().backward()
    # The output and the weight's gradient; the gradient of the sum has one element, spread out without memory.
    at_least = 4 * (200 * 500 + 500 * 1000)
    assert at_least <= memory.bytes < 1.25 * at_least
