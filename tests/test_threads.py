"""Threads and processes around the C++ kernels: how many, which lock they hold, and what a fork leaves of them."""

from __future__ import annotations

import pytest
import torch
from processes import run_python

import fastkd


@pytest.mark.native
def test_a_forked_worker_does_not_hang() -> None:
    """After a parallel region in the parent, libgomp would wait in a forked child for threads that are gone."""
    out = run_python(
        """
        import warnings
        warnings.filterwarnings("ignore")
        import torch, fastkd
        from torch.utils.data import DataLoader
        torch.set_num_threads(2)
        student, teacher = torch.randn(64, 4096), torch.randn(64, 4096)
        want = fastkd.kd_loss(student, teacher, impl="native")
        class Losses(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, i):
                torch.set_num_threads(2)
                return fastkd.kd_loss(student, teacher, impl="native")
        losses = list(DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
        assert all(torch.equal(x, want) for x in losses)
        print(len(losses))
        """
    )
    assert out.split() == ["4"]


@pytest.mark.native
def test_a_child_of_a_process_that_ran_torch_alone_does_not_hang() -> None:
    """It is torch that made the pool of threads, and the child's first call is the first of all."""
    out = run_python(
        """
        import warnings
        warnings.filterwarnings("ignore")
        import multiprocessing, torch, fastkd
        torch.set_num_threads(2)
        student, teacher = torch.ones(64, 4096), torch.zeros(64, 4096)
        torch.ones(1 << 22).exp().sum()
        def child():
            print(float(fastkd.kd_loss(student, teacher, impl="native")), flush=True)
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        alive = process.is_alive()
        process.kill()
        assert not alive
        """
    )
    assert out.split() == ["0.0"]


@pytest.mark.native
def test_threads_follow_torch() -> None:
    """torch.set_num_threads(1) leaves the process at the CPU time of one thread, and the bits do not change."""
    out = run_python(
        """
        import os, time, torch, fastkd
        def threads():
            return len(os.listdir("/proc/self/task"))
        student, teacher = torch.randn(256, 8192), torch.randn(256, 8192)
        torch.set_num_threads(1)
        before = threads()
        one = fastkd.kd_loss(student, teacher, impl="native")
        assert threads() == before, (threads(), before)
        torch.set_num_threads(3)
        three = fastkd.kd_loss(student, teacher, impl="native")
        assert threads() >= before + 2, (threads(), before)
        assert torch.equal(one, three)
        print("ok")
        """
    )
    assert out.split() == ["ok"]


@pytest.mark.native
def test_the_gil_is_released() -> None:
    """Another Python thread makes progress while the kernels run."""
    import threading
    import time

    student, teacher = torch.randn(512, 32768, requires_grad=True), torch.randn(512, 32768)
    fastkd.kd_loss(student[:2], teacher[:2], impl="native")
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.001)  # to go on, this thread needs the GIL

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = ticks[0]
        loss = fastkd.kd_loss(student, teacher, impl="native")
        during = ticks[0] - before
        before = ticks[0]
        loss.backward()
        during = min(during, ticks[0] - before)
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(threads)
    assert during > 3
