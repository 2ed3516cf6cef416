import copy

import torch
from torch import nn

from toolchain.distiller import Distiller, Frozen, fingerprint, frozen_parts


class Pair(Distiller):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.teacher = Frozen(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.BatchNorm1d(2)))
        self.bank = nn.Embedding(5, 4)
        self.bank.no_decay = True


def test_frozen_copies_and_ignores_train_and_takes_no_gradient():
    source = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.BatchNorm1d(2))
    frozen = Frozen(source)
    source[0].weight.data.zero_()
    assert frozen.module[0].weight.any()
    frozen.train()
    assert not any(module.training for module in [frozen, *frozen.module.modules()])
    before = copy.deepcopy(frozen.module.state_dict())
    x = torch.ones(3, 2, requires_grad=True)
    assert not frozen(x).requires_grad
    assert all(torch.equal(before[name], value) for name, value in frozen.module.state_dict().items())
    assert source[0].weight.requires_grad


def test_frozen_is_absent_from_parameters_and_state_and_moves_with_to():
    pair = Pair()
    assert not [name for name in pair.state_dict() if "teacher" in name]
    assert not [name for name, _ in pair.named_parameters() if "teacher" in name]
    pair.load_state_dict(pair.state_dict())
    pair.to(torch.float64)
    assert pair.teacher.module[0].weight.dtype == torch.float64
    assert list(frozen_parts(pair)) == ["teacher"]


def test_frozen_refreshes_from_a_student_as_it_is_now():
    student = nn.Linear(2, 2)
    frozen = Frozen(student)
    student.weight.data.fill_(3)
    frozen.refresh(student)
    student.weight.data.fill_(4)
    assert frozen.refreshed
    assert torch.equal(frozen.module.weight, torch.full((2, 2), 3.0))
    assert copy.deepcopy(frozen).module is not frozen.module


def test_param_groups_spare_norms_biases_and_flagged_modules():
    pair = Pair()
    decayed, free = pair.param_groups(0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert {id(p) for p in free["params"]} == {
        id(p) for p in (pair.student[0].bias, pair.student[1].weight, pair.student[1].bias, pair.bank.weight)
    }
    assert free["weight_decay"] == 0
    assert "weight_decay" not in decayed


def test_param_groups_take_tied_weights_once():
    pair = Pair()
    pair.tied = nn.Linear(4, 5)
    pair.tied.weight = pair.bank.weight
    found = [id(p) for group in pair.param_groups(0.1) for p in group["params"]]
    assert len(found) == len(set(found))


def test_fingerprint_sees_frozen_weights():
    a = Pair()
    b = copy.deepcopy(a)
    assert fingerprint(a) == fingerprint(b)
    b.teacher.module[0].bias.data += 1
    assert fingerprint(a) != fingerprint(b)
