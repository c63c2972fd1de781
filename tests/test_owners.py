"""Who owns a parameter, and what it is called: by a scan of what is alive, or by the last one where nothing moved."""

from __future__ import annotations

import gc

import pytest
import torch
from small import Net, Stack
from torch import nn

from qcompile import owners as module
from qcompile.owners import owners, owners_of


@pytest.fixture
def scans(monkeypatch):
    made = []
    real = gc.get_objects
    monkeypatch.setattr(module.gc, "get_objects", lambda: (made.append(1), real())[1])
    return made


def names(found, model):
    return {".".join(filter(None, found[id(p)][1:])) for p in model.parameters()}


def test_names_are_those_in_the_outermost_module():
    model = nn.ModuleDict({"a": Net(), "b": Net()})
    assert names(owners(), model) == {name for name, _ in model.named_parameters()}
    wrapped = torch.compile(model["a"])
    assert names(owners(), wrapped) == {f"a.{name}" for name, _ in model["a"].named_parameters()}


def test_classes_that_cannot_be_hashed():
    """They are somebody else's, and live beside the model."""

    class Meta(type):
        def __eq__(cls, other):
            return False

    stranger, model = Meta("Stranger", (), {})(), Net()
    assert names(owners(), model) == {name for name, _ in model.named_parameters()} and stranger is not None


def test_the_last_scan_serves_others(scans):
    model = nn.ModuleList([Net(), Net()])
    first = owners_of(model[0].parameters())
    assert scans == [1] and len(first) >= 2  # all that there is
    second = owners_of(model[1].parameters())
    assert scans == [1] and names(second, model[1]) == {f"1.{name}" for name, _ in model[1].named_parameters()}
    assert owners_of([torch.ones(2), 3]) == {} and scans == [1]


def test_scanned_again_where_something_moved(scans):
    model = Net()
    owners_of(model.parameters())
    model.up.weight = nn.Parameter(torch.zeros_like(model.up.weight))
    assert names(owners_of(model.parameters()), model) == {name for name, _ in model.named_parameters()} and len(scans) == 2
    taken, model.up = model.up.weight, nn.Identity()  # the parameter outlives its module
    gc.collect()
    assert id(taken) not in owners_of([taken]) and len(scans) == 3
    later = Stack()
    assert names(owners_of(later.parameters()), later) == {name for name, _ in later.named_parameters()} and len(scans) == 4
