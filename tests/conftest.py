"What all tests have in common."
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    "What a test draws is the same each time: now and then a thin network answers 0 to everything."
    torch.manual_seed(0)
