"""Jobs in threads of one torch thread each, as if they were done in turn."""

import time

import pytest
import torch

from xclip_lab.parallel import in_threads, workers_on

CPU = torch.device("cpu")


def switches(_):
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("workers", [1, 3])
def test_in_order_and_within_what_the_caller_is_within(workers):
    assert list(in_threads(lambda job: (time.sleep(0.02 * (3 - job)), job)[1], range(4), workers)) == [
        0,
        1,
        2,
        3,
    ]
    assert list(in_threads(switches, [0], workers)) == [(True, False)]
    with torch.no_grad():
        assert list(in_threads(switches, [0], workers)) == [(False, False)]
    with torch.inference_mode():
        assert list(in_threads(switches, [0], workers)) == [(False, True)]


@pytest.mark.parametrize("ends", [KeyError, KeyboardInterrupt])
def test_an_error_ends_it_and_leaves_the_threads_as_they_were(ends):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    begun = []

    def work(job):
        begun.append(job)
        time.sleep(0.01)
        if job == 1:
            raise ends
        assert workers_on(CPU) == 1  # what is nested stays in its thread

    try:
        with pytest.raises(ends):
            list(in_threads(work, range(100), 2))
        assert workers_on(CPU) == 3
        assert len(begun) < 50
    finally:
        torch.set_num_threads(before)
