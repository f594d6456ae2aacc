"""transformers.Trainer and accelerate with our optimizers, on a GPT-2 of a few thousand numbers."""

import contextlib

import pytest
import torch
from small_models import check_partition, routes
from torch import nn

from stiefel.optim import (
    ARO,
    RMNP,
    ROOT,
    AuON,
    DCTAdamW,
    HybridAuON,
    Muon,
    NorMuon,
    Trion,
    split_parameters,
)
from stiefel.optim.trainer import TrainerFactory, trainer_optimizer

CONTEXT = 16
STEPS = 6
METHODS = (Muon, NorMuon, RMNP, ROOT, AuON, HybridAuON, ARO, Trion, DCTAdamW)
QKV = {"split": {"c_attn": 3}}


@pytest.fixture(autouse=True)
def _offline_and_quiet(monkeypatch):
    """No look at the hub; no log line of transformers, whose warnings go through logging."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def tiny_gpt2(seed=0, dropout=0.1):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_positions=CONTEXT,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


class Counting(torch.utils.data.Dataset):
    """Each row counts up from another start: learnable in a few steps."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        row = (torch.arange(CONTEXT) + 7 * index) % 64
        labels = row.clone()
        labels[0] = -100  # never predicted; Trainer divides by the number of labels
        return {"input_ids": row, "labels": labels}


def make_trainer(folder, model=None, *, steps=STEPS, chosen=None, model_init=None, **settings):
    from transformers import Trainer, TrainingArguments

    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    chosen = chosen or trainer_optimizer(NorMuon, lr=0.02, adamw_lr=0.01, routing=QKV)
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=chosen,
        model_init=model_init,
    )


def run(trainer, **options):
    """Train without the printed log."""
    with contextlib.redirect_stdout(None):
        trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def inner(trainer):
    """The optimizer below accelerate's shell."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def made(model, cls=NorMuon, **settings):
    """The optimizer as Trainer makes it."""
    factory, kwargs = trainer_optimizer(cls, **settings)
    return factory()(model, **kwargs)


class TestGPT2Routing:
    def test_conv1d_is_transposed_and_the_tied_head_elementwise(self):
        model = tiny_gpt2()
        groups = split_parameters(model, **QKV)
        check_partition(model, groups)
        expected = {name: ("elementwise", None, None) for name, _ in model.named_parameters()}
        for i in (0, 1):
            block = f"transformer.h.{i}"
            expected[f"{block}.attn.c_attn.weight"] = ("matrix", "transpose", 3)
            for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                expected[f"{block}.{name}.weight"] = ("matrix", "transpose", None)
        assert routes(groups) == expected
        assert model.lm_head.weight is model.transformer.wte.weight
        assert expected["transformer.wte.weight"][0] == expected["transformer.wpe.weight"][0]

    def test_conv1d_moves_as_the_linear_layer_of_its_transpose(self):
        """The point of the view: NorMuon's rows are neurons, which Conv1D stores as columns."""
        model = tiny_gpt2()
        conv = model.transformer.h[0].mlp.c_fc
        linear = nn.Linear(*conv.weight.shape, bias=False)
        linear.weight.data = conv.weight.data.mT.clone()
        conv.weight.grad = torch.randn(conv.weight.shape)
        linear.weight.grad = conv.weight.grad.mT.clone()
        NorMuon(split_parameters(model), lr=0.1).step()
        NorMuon([linear.weight], lr=0.1).step()
        torch.testing.assert_close(conv.weight.mT, linear.weight)

    @pytest.mark.parametrize("decay", [0.0, 0.05])
    def test_every_parameter_is_in_one_group_and_only_weights_decay(self, decay):
        model = tiny_gpt2()
        model.transformer.wpe.weight.requires_grad_(False)
        optimizer = made(model, weight_decay=0.2, adamw_weight_decay=decay, routing=QKV)
        found = [p for group in optimizer.param_groups for p in group["params"]]
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert len(found) == len(trained)
        assert {id(p) for p in found} == trained
        decays = {
            name: group["weight_decay"]
            for group in optimizer.param_groups
            for name in group["param_names"]
        }
        assert decays["transformer.wte.weight"] == decay
        assert decays["transformer.h.0.attn.c_attn.weight"] == 0.2
        vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
        assert vectors
        assert {decays[name] for name in vectors} == {0.0}

    def test_a_model_of_matrices_and_biases_only(self):
        optimizer = made(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), routing={"head": None})
        assert [(g["rule"], len(g["params"])) for g in optimizer.param_groups] == [
            ("matrix", 2),
            ("elementwise", 2),
        ]
        assert optimizer.param_groups[1]["weight_decay"] == 0.0


class TestArguments:
    def test_the_model_is_not_asked_for(self):
        with pytest.raises(TypeError, match=r"class of stiefel.optim.*got Linear"):
            trainer_optimizer(nn.Linear(2, 2))

    def test_another_class_is_refused(self):
        with pytest.raises(TypeError, match="got AdamW"):
            trainer_optimizer(torch.optim.AdamW)

    @pytest.mark.parametrize("name", ["learning_rate", "params"])
    def test_a_setting_that_the_class_lacks(self, name):
        with pytest.raises(TypeError, match=rf"RMNP has no \['{name}'\]; it takes lr, momentum"):
            trainer_optimizer(RMNP, **{name: 1.0})

    def test_a_routing_that_nothing_takes(self):
        with pytest.raises(TypeError, match=r"routing has \['splits'\], but may have head"):
            trainer_optimizer(RMNP, routing={"splits": {}})

    def test_a_value_out_of_range_is_refused_when_training_starts(self, tmp_path):
        chosen = trainer_optimizer(RMNP, lr=-1.0)
        with pytest.raises(ValueError, match="lr must be finite and ≥ 0"):
            run(make_trainer(tmp_path, tiny_gpt2(), chosen=chosen))

    def test_an_older_trainer_is_named(self):
        """transformers below 5.2 called whatever it was given with lists of parameters."""
        factory, kwargs = trainer_optimizer(RMNP)
        with pytest.raises(TypeError, match=r"transformers 5\.2 or newer"):
            factory([{"params": []}], **kwargs)

    def test_trainer_takes_it_for_a_factory(self):
        from transformers.trainer_optimizer import is_optimizer_factory

        factory, _ = trainer_optimizer(RMNP)
        assert factory is TrainerFactory
        assert is_optimizer_factory(factory)


class TestTraining:
    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
    def test_every_method_lowers_the_loss(self, tmp_path, method):
        """At its own default rate."""
        chosen = trainer_optimizer(method, adamw_lr=0.01, routing=QKV)
        trainer = make_trainer(tmp_path, tiny_gpt2(dropout=0.0), steps=12, chosen=chosen)
        losses = run(trainer)
        assert type(inner(trainer)) is method
        assert len(losses) == 12
        assert losses[-1] < losses[0] - 0.2

    def test_it_is_the_plain_loop(self, tmp_path):
        """Trainer adds nothing of its own: no decay, no rate; its schedule scales every group."""
        seen = []
        model = tiny_gpt2(dropout=0.0)
        trainer = make_trainer(
            tmp_path, model, learning_rate=123.0, weight_decay=0.5, max_grad_norm=0.0
        )
        model.register_forward_pre_hook(
            lambda _, __, batch: seen.append(batch["input_ids"]), with_kwargs=True
        )
        losses = run(trainer)

        twin = tiny_gpt2(dropout=0.0)
        optimizer = NorMuon(split_parameters(twin, **QKV), lr=0.02, adamw_lr=0.01)
        peaks = [group["lr"] for group in optimizer.param_groups]
        for step, rows in enumerate(seen):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * (1 - step / STEPS)
            loss = twin(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert loss.item() == pytest.approx(losses[step], abs=1e-3)
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own, other)

    @pytest.mark.parametrize("method", [NorMuon, ARO, Trion, DCTAdamW], ids=lambda m: m.__name__)
    def test_a_checkpoint_saved_mid_run_resumes_to_the_same_loss(self, tmp_path, method):
        chosen = trainer_optimizer(method, lr=0.02, adamw_lr=0.01, routing=QKV)
        settings = {"save_strategy": "steps", "save_steps": STEPS // 2, "chosen": chosen}
        unbroken = make_trainer(tmp_path / "a", tiny_gpt2(), **settings)
        losses = run(unbroken)
        resumed = make_trainer(tmp_path / "b", tiny_gpt2(seed=1), **settings)
        checkpoint = tmp_path / "a" / f"checkpoint-{STEPS // 2}"
        assert run(resumed, resume_from_checkpoint=str(checkpoint)) == losses
        for own, other in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
            assert torch.equal(own, other)

    def test_model_init_routes_the_model_that_is_trained(self, tmp_path):
        """Trainer makes the model anew for every run; nothing of an earlier one is kept."""
        chosen = trainer_optimizer(NorMuon, lr=0.02, adamw_lr=0.01, routing=QKV)
        before = {**chosen[1]}
        trainer = make_trainer(
            tmp_path, steps=2, chosen=chosen, model_init=lambda: tiny_gpt2(dropout=0.0)
        )
        losses, models = [], [trainer.model]
        for _ in range(2):
            losses.append(run(trainer))
            models.append(trainer.model)
            held = {id(p) for group in inner(trainer).param_groups for p in group["params"]}
            assert held == {id(p) for p in trainer.model.parameters()}
        assert len({id(model) for model in models}) == 3
        assert losses[0] == losses[1][-2:]
        assert chosen[1] == before

    def test_the_ready_optimizer(self, tmp_path):
        """Trainer(optimizers=...), the way that older versions have too."""
        from transformers import Trainer

        model = tiny_gpt2(dropout=0.0)
        optimizer = RMNP(split_parameters(model, **QKV), lr=0.02, adamw_lr=0.01)
        arguments = make_trainer(tmp_path, model).args
        trainer = Trainer(model, arguments, train_dataset=Counting(), optimizers=(optimizer, None))
        losses = run(trainer)
        assert losses[-1] < losses[0]
        assert inner(trainer) is optimizer


class TestAccelerate:
    @staticmethod
    def prepared(seed):
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = tiny_gpt2(seed, dropout=0.0)
        optimizer = NorMuon(split_parameters(model, **QKV), lr=0.02, adamw_lr=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        return accelerator, *accelerator.prepare(model, optimizer, schedule)

    @staticmethod
    def advance(accelerator, model, optimizer, schedule, steps):
        losses = []
        for step in steps:
            batch = Counting()[step]
            loss = model(**{key: row[None] for key, row in batch.items()}).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def test_load_state_goes_on_as_if_nothing_had_happened(self, tmp_path):
        first = self.prepared(seed=0)
        self.advance(*first, range(4))
        first[0].save_state(tmp_path / "state")
        expected = self.advance(*first, range(4, 8))

        second = self.prepared(seed=1)
        second[0].load_state(tmp_path / "state")
        assert self.advance(*second, range(4, 8)) == expected
        for own, other in zip(second[1].parameters(), first[1].parameters(), strict=True):
            assert torch.equal(own, other)
        assert [g["lr"] for g in second[2].param_groups] == [g["lr"] for g in first[2].param_groups]

    def test_accumulation_steps_once_a_window(self):
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny_gpt2(dropout=0.0)
        model, optimizer = accelerator.prepare(model, RMNP(split_parameters(model), lr=0.02))
        weight = model.transformer.h[0].mlp.c_fc.weight
        moved = []
        for step in range(4):
            before = weight.detach().clone()
            batch = Counting()[step]
            with accelerator.accumulate(model):
                accelerator.backward(model(**{key: row[None] for key, row in batch.items()}).loss)
                optimizer.step()
                optimizer.zero_grad()
            moved.append(not torch.equal(before, weight))
        assert moved == [False, True, False, True]


def update(cls, shape, **settings):
    """What one step at rate 1 on noise adds to a zero weight, and how many numbers it keeps."""
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=generator)
    optimizer = cls([weight], lr=1.0, **settings)
    optimizer.step()
    kept = sum(t.numel() for t in optimizer.state[weight].values() if t.ndim)
    return weight.detach(), kept


SHAPES = ((48, 48), (96, 32), (32, 96))


class TestTheTableInTheDocs:
    """``docs/training.md``: how large a step is at a rate, and what is kept."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(
        ("cls", "settings", "size"),
        [
            (Muon, {"scale": "rms"}, lambda r, c: 0.2),
            (Muon, {}, lambda r, c: c**-0.5),
            (NorMuon, {}, lambda r, c: 0.2),
            (ROOT, {}, lambda r, c: 0.2),
            (RMNP, {}, lambda r, c: max(1, r / c) ** 0.5 * c**-0.5),
            (AuON, {}, lambda r, c: max(1, r / c) ** 0.5 * (r * c) ** -0.5),
            (HybridAuON, {}, lambda r, c: max(1, r / c) ** 0.5 * (r * c) ** -0.5),
            (ARO, {}, lambda r, c: 0.2),
            (Trion, {}, lambda r, c: 0.5 * c**-0.5),
            (DCTAdamW, {}, lambda r, c: 0.5),
        ],
    )
    def test_root_mean_square_of_a_step(self, cls, settings, size, shape):
        """Exact up to what five Newton–Schulz steps leave (10 %) and to AdamW's first step."""
        moved, _ = update(cls, shape, weight_decay=0.0, **settings)
        assert moved.square().mean().sqrt().item() == pytest.approx(size(*shape), rel=0.1)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(
        ("cls", "settings", "numbers"),
        [
            (Muon, {}, lambda r, c: r * c),
            (NorMuon, {}, lambda r, c: r * c + r),
            (RMNP, {}, lambda r, c: r * c),
            (ROOT, {}, lambda r, c: r * c),
            (AuON, {}, lambda r, c: r * c),
            (HybridAuON, {}, lambda r, c: r * c),
            (ARO, {}, lambda r, c: r * c + min(r, c) ** 2),
            (ARO, {"base": "adam"}, lambda r, c: 2 * r * c + min(r, c) ** 2),
            (Trion, {}, lambda r, c: r * c),
            (DCTAdamW, {}, lambda r, c: (2 * max(r, c) + 1) * min(r, c) // 4),
            (
                DCTAdamW,
                {"error_feedback": 8},
                lambda r, c: (2 * max(r, c) + 1) * min(r, c) // 4 + r * c + 2 * max(r, c),
            ),
        ],
    )
    def test_numbers_kept(self, cls, settings, numbers, shape):
        _, kept = update(cls, shape, **settings)
        assert kept == numbers(*shape)
