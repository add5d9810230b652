"""Values that no training can use are named before it starts; an error that nobody foresaw is one line."""

import pytest
import torch

from vreflection_hub_card.errors import InputError
from vreflection_training import VReflectionSFTConfig, cli
from vreflection_training.recipe import parse
from vreflection_training.script_arguments import VReflectionScriptArguments


GOOD = "from_scratch: qwen2_5_vl\ndataset_name: glyphsearch\nuse_cpu: true\nbf16: false\nreport_to: none\n"


def parse_recipe(folder, lines: str):
    (folder / "recipe.yaml").write_text(GOOD + lines + "\n")
    return parse([str(folder / "recipe.yaml"), "--output_dir", str(folder)])


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("learning_rate: .nan", "learning_rate"),
        ("warmup_steps: .inf", "warmup_steps"),
        ("attention_temperature: .inf", "attention_temperature"),
        ("weight_decay: -1", "weight_decay"),
        ("max_grad_norm: -1", "max_grad_norm"),
        ("adam_beta2: 1", "adam_beta2"),
        ("adam_epsilon: -1", "adam_epsilon"),
        ("dataloader_num_workers: -1", "dataloader_num_workers"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps"),
        ("lr_scheduler_kwargs: abc", "lr_scheduler_kwargs"),
        ('dataset_options: "5"', "dataset_options"),
        ("max_length: -5", "max_length"),
        ("save_steps: 0", "save_steps"),
        ("restore_callback_states_from_checkpoint: true", "restore_callback_states_from_checkpoint"),
        ('eval_datasets: "{}"\neval_strategy: steps', "eval_datasets"),
        ("dataset_kwargs: {add_special_tokens: true}", "dataset_kwargs"),
        ("model_init_kwargs: {dtype: float16}", "model_options"),
        ("pad_token: x", "pad_token"),
        ("stage: path\nalignment: joint", "stage='path'` doesn't use `alignment`"),
        ("stage: 1\nattention_temperature: 2", "stage='1'` doesn't use `attention_temperature`"),
        ("stage: 2\nbcm_receives_ce: false", "stage='2'` doesn't use `bcm_receives_ce`"),
        ("stage: sft\nslot_ce: true", "stage='sft'` doesn't use `slot_ce`"),
        ("stage: sft\nlatent_sigma: 0.5", "no setting 'latent_sigma'"),
        ("stage: grpo\nlambda_dac: 1", "no setting 'lambda_dac'"),
        ("stage: grpo\nuse_vllm: true", "vLLM doesn't return the latents"),
        ("stage: grpo\nreward_funcs: [answer]", "`reward_funcs` must be some of exact_answer"),
        ("lora_r: 4", "`lora_r` is for adapters"),
        ("eval_on_start: true", "eval_datasets"),
        ("predict_with_generate: true", "eval_datasets"),
        ("neftune_noise_alpha: -1", "neftune_noise_alpha"),
        ("trust_remote_code: true", "trust_remote_code"),
        ("accelerator_config: {dispatch_batches: true}", "dispatch_batches"),
        ("metric_for_best_model: eval_exact_match", "predict_with_generate=True"),
        ("stage: grpo\ncast_lm_head_to_fp32: true", "cast_lm_head_to_fp32"),
        ("stage: grpo\nsteps_per_generation: 3\ngradient_accumulation_steps: 2", "one must divide the other"),
    ],
)
def test_a_value_that_no_training_can_use(tmp_path, lines, named):
    with pytest.raises(InputError, match=named):
        parse_recipe(tmp_path, lines)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("loss", False),
        ("loss_ce", False),
        ("eval_loss_feat", False),
        ("eval_held_out_loss_attn", False),
        ("latent_distance", False),
        ("eval_entropy", False),
        ("student_inside_box", True),
        ("mean_token_accuracy", True),
    ],
)
def test_the_best_checkpoint_has_the_smallest_loss(tmp_path, metric, greater):
    args = VReflectionSFTConfig(str(tmp_path), use_cpu=True, metric_for_best_model=metric)
    assert args.greater_is_better is greater
    assert VReflectionSFTConfig(
        str(tmp_path), use_cpu=True, metric_for_best_model=metric, greater_is_better=True
    ).greater_is_better


def test_batches_of_a_stream_are_not_sent_from_rank_to_rank(tmp_path):
    """They hold texts, which accelerate can't send; trl turns it off for a stream of training rows alone."""
    assert VReflectionSFTConfig(str(tmp_path), use_cpu=True).accelerator_config.dispatch_batches is False


def test_options_of_no_data_set():
    with pytest.raises(ValueError, match="entries of `datasets`"):
        VReflectionScriptArguments(datasets=[{"format": "glyphsearch"}], dataset_options={"count": 3})


@pytest.mark.parametrize(
    ("command", "line", "named"),
    [
        ("train", "model_options: {region_pooling: max}", "region_pooling"),
        ("train", "model_options: {compression_num_heads: 7}", "compression_num_heads"),
        ("train", "model_options: {num_latent_tokens: 0}", "num_latent_tokens"),
        ("train", "log_level: nowhere", "recipe.yaml"),
        ("train", "dataset_options: {split: train, count: two}", "recipe.yaml"),
        ("check", "dataset_options: {split: train, count: two}", "recipe.yaml"),
    ],
)
def test_what_no_model_or_data_can_have_is_one_line(tmp_path, capsys, command, line, named):
    options = "" if "dataset_options" in line else "dataset_options: {split: train, count: 2}\n"
    (tmp_path / "recipe.yaml").write_text(f"{GOOD}{options}{line}\noutput_dir: {tmp_path / 'out'}\n")
    assert cli.main([command, str(tmp_path / "recipe.yaml")]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_numbers_become_the_type_of_their_field(tmp_path):
    *_, args = parse_recipe(tmp_path, "adam_beta1: 0\nmax_grad_norm: .inf\ndataloader_drop_last: 0\nrun_name: 2024")
    assert [args.adam_beta1, args.max_grad_norm, args.run_name] == [0.0, float("inf"), "2024"]
    assert type(args.adam_beta1) is float and args.dataloader_drop_last is False


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("one\ntwo"), "RuntimeError: one (at "),
        (KeyError("x"), "KeyError"),
        (
            RuntimeError(
                "Caught it in a worker.\nOriginal Traceback (most recent call last):\n  File\nIndexError: it"
            ),
            "IndexError: it",
        ),
    ],
)
def test_an_unforeseen_error_is_one_line(monkeypatch, capsys, error, said):
    def load(*arguments):
        raise error

    monkeypatch.setattr(torch, "load", load)

    class Command:
        @staticmethod
        def add_parser(commands):
            commands.add_parser("fault").set_defaults(run=lambda options: torch.load("x"))

    monkeypatch.setattr(cli, "COMMANDS", [Command])
    assert cli.main(["fault"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
