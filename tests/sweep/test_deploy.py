"""The command for an alpha, and the chart's values for a canary of it: read by the parsers and rendered by Helm."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from expo_serve.cli import options
from expo_serve.cli.options import Options, add_source_flags, read_options
from expo_serve.cli.parser import Parser
from expo_serve.cli.running import add_running_flags
from expo_serve.config import ExpoConfig, Pinned, Source
from expo_serve.sweep import canary
from expo_serve.sweep.canary import variant_name
from expo_serve.sweep.deploy import chart_values, deploy_command
from expo_serve.sweep.flags import WITHOUT_NEGATION, read_flags
from tests.deploy.chart import CHART, Object, Values, documents, lint, pick, render
from tests.deploy.tools import HELM, need

SHAS = {
    "base": "0123456789abcdef0123456789abcdef01234567",
    "aligned": "89abcdef0123456789abcdef0123456789abcdef",
    "delta": "fedcba9876543210fedcba9876543210fedcba98",
}
HUB = {side: Source(name=f"org/{side}", path=f"/cache/{side}", revision=sha) for side, sha in SHAS.items()}
FOLDERS = {side: Source(name=side, path=f"/data/{side}") for side in SHAS}


def pinned(base: Source, other: Source, side: str = "aligned", /, **fields: Any) -> ExpoConfig:
    """A configuration as a sweep has it: found, and at an alpha that does not count."""
    given = {"base": base, side: other}
    names = {key: source.name if source.revision else source.path for key, source in given.items()}
    return ExpoConfig.model_validate(
        {**names, "alpha": 7, "pinned": Pinned.model_validate({**given, "model": side}), **fields}
    )


@dataclass(frozen=True)
class Case:
    """What a sweep was given."""

    config: ExpoConfig
    alpha: float = 0.3
    arguments: tuple[str, ...] = ()
    file_options: Mapping[str, Any] | None = None

    @property
    def command(self) -> list[str]:
        """The words of the command, after the program's name."""
        words = shlex.split(deploy_command(self.config, self.alpha, self.arguments, self.file_options))
        assert words[0] == "expo-serve"
        return words[1:]

    def text(self, **settings: Any) -> str:
        """The chart's values, as they are written."""
        return chart_values(self.config, self.alpha, self.arguments, self.file_options, **settings)

    def values(self, **settings: Any) -> Values:
        """The same, read."""
        values: Values = yaml.safe_load(self.text(**settings))
        return values


RULES: dict[str, Any] = {
    "alpha_rules": ("embed_tokens|lm_head=0", "-x=-0.5"),
    "unmatched": "copy",
    "allow": ("other-base", "different-revisions"),
    "rounding": "nearest",
    "rounding_seed": 7,
}
CASES = {
    "hub": Case(pinned(HUB["base"], HUB["aligned"])),
    "folders": Case(pinned(FOLDERS["base"], FOLDERS["aligned"])),
    "one-of-each": Case(pinned(HUB["base"], FOLDERS["aligned"]), alpha=-1.5),
    "delta": Case(pinned(HUB["base"], HUB["delta"], "delta"), alpha=1000),
    "adapter-of-several": Case(
        pinned(
            HUB["base"], Source(name="org/delta/a/b", path="/x", revision=SHAS["delta"]), "delta",
            delta="org/delta", delta_subfolder="a/b",
        )
    ),
    "folder-of-a-delta": Case(pinned(FOLDERS["base"], FOLDERS["delta"], "delta", delta_subfolder="one"), alpha=0.125),
    "rules": Case(pinned(HUB["base"], HUB["aligned"], **RULES)),
    "pickles": Case(pinned(HUB["base"], HUB["aligned"], allow_pickle_index=True, allow_links=("/srv/blobs",))),
    "flags": Case(
        pinned(HUB["base"], HUB["aligned"]),
        arguments=("-tp", "2", "--max-model-len", "-1", "--hf-overrides={}", "--stop", "a b", "'", "--enforce_eager"),
    ),
    "file": Case(
        pinned(HUB["base"], HUB["aligned"]),
        arguments=("--max-num-seqs", "4", "--pipeline-parallel-size=2"),
        file_options={"dtype": "auto", "enable_prefix_caching": False, "hf-overrides": {"a": [1]}, "stop": [1, "x"]},
    ),
    "zero": Case(pinned(HUB["base"], HUB["aligned"]), alpha=0),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def read(words: list[str]) -> Options:
    """Parse a command line of the server, which refuses what it would refuse then."""
    parser = Parser(prog="expo-serve")
    add_source_flags(parser)
    add_running_flags(parser)
    return read_options(parser, words)


def servers(values: Values) -> dict[str, Options]:
    """The command line of each variant's pod."""
    found = {}
    for one in render(values):
        if one["kind"] == "Deployment":
            (container,) = one["spec"]["template"]["spec"]["containers"]
            found[one["metadata"]["labels"]["expo-serve/variant"]] = read(container["args"])
    return found


def vllms(given: Options) -> dict[str, tuple[str, ...]]:
    """vLLM's flags without those that the chart adds, by their names."""
    names = {"tp": "tensor-parallel-size", "pp": "pipeline-parallel-size"}
    flags = {names.get(flag.name, flag.name): flag.values for flag in read_flags(given.unknown)}
    return {
        name: values for name, values in flags.items() if name not in ("served-model-name", "port", "shutdown-timeout")
    }


def comparable(config: ExpoConfig) -> dict[str, Any]:
    """A configuration, with folders by the last parts of their paths."""
    found = config.model_dump(exclude={"pinned"})
    for side in SHAS:
        if found[side] and found[side].startswith("/"):
            found[side] = Path(found[side]).name
    return found


@every_case
def test_command_serves_what_was_measured(case: Case) -> None:
    given = read(case.command)
    revisions = {
        f"{side}_revision": source.revision
        for side in SHAS
        if case.config.pinned and (source := getattr(case.config.pinned, side))
    }
    assert given.config == case.config.model_copy(update={"pinned": None, "alpha": case.alpha, **revisions})


def test_command_repeats_vllms_flags_as_they_were() -> None:
    assert read(CASES["flags"].command).unknown == list(CASES["flags"].arguments)
    assert read(CASES["file"].command).unknown == [
        "--dtype", "auto", "--no-enable-prefix-caching", "--hf-overrides", '{"a": [1]}', "--stop", "1", "x",
        *CASES["file"].arguments,
    ]  # fmt: skip


def test_command_is_one_line_that_a_shell_reads(tmp_path: Path) -> None:
    """Also where names are such as nobody wants them."""
    folder = tmp_path / "a b'c$HOME;\"x"
    config = pinned(Source(name=folder.name, path=str(folder)), FOLDERS["aligned"], alpha_rules=("a|b c$=1",))
    command = deploy_command(config, 0.5, ["--stop", "`id`", "$(id)"])
    assert "\n" not in command
    echoed = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert echoed.stdout.splitlines() == shlex.split(command)
    assert read(shlex.split(command)[1:]).config.base == str(folder)


def test_command_names_folders_from_wherever_it_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    config = pinned(FOLDERS["base"], FOLDERS["aligned"], base="base", aligned="~/aligned")
    given = read(shlex.split(deploy_command(config, 0.5))[1:]).config
    assert (given.base, given.aligned) == (str(tmp_path / "base"), "/home/somebody/aligned")


def test_a_commit_in_the_cache_stays_the_folder_it_is_and_becomes_the_charts_hub_id() -> None:
    snapshot = f"/cache/models--org--base/snapshots/{SHAS['base']}"
    config = pinned(HUB["base"], HUB["aligned"], base=snapshot)
    given = read(shlex.split(deploy_command(config, 0.5))[1:]).config
    assert (given.base, given.base_revision) == (snapshot, SHAS["base"])
    defaults = Case(config).values()["defaults"]
    assert (defaults["base"], defaults["baseRevision"]) == ("org/base", SHAS["base"])


@every_case
def test_chart_runs_the_command(case: Case) -> None:
    """The rendered arguments, read by the command's own parser, say what the command says; alpha 0 differs in alpha."""
    command, pods = read(case.command), servers(case.values())
    alphas = {variant_name(f"{alpha:g}"): alpha for alpha in {0.0, case.alpha}}
    assert set(pods) == set(alphas)
    for name, alpha in alphas.items():
        assert comparable(pods[name].config) == {**comparable(command.config), "alpha": alpha}
        assert vllms(pods[name]) == vllms(command)


@every_case
def test_values_pass_the_charts_own_checks(case: Case, tmp_path: Path) -> None:
    """Linted, and read by Helm from the very text, comments and all."""
    result = lint(case.values())
    assert result.returncode == 0, result.stdout + result.stderr
    file = tmp_path / "values.yaml"
    file.write_text(case.text())
    command = [need(HELM), "template", "demo", str(CHART), "--namespace", "models", "--values", str(file)]
    rendered = subprocess.run([*command, "--kube-version", "1.35.0"], capture_output=True, text=True, check=True)
    names = [
        one["metadata"]["name"] for one in yaml.safe_load_all(rendered.stdout) if one and one["kind"] == "Deployment"
    ]
    assert names == [f"demo-expo-serve-{name}" for name in case.values()["variants"]]


def backends(objects: list[Object]) -> list[tuple[str, int]]:
    """Where the route sends what names no variant, with weights."""
    rule = pick(objects, "HTTPRoute")["spec"]["rules"][-1]
    return [(one["name"].removeprefix("demo-expo-serve-"), one["weight"]) for one in rule["backendRefs"]]


def test_requests_are_divided_and_moving_weight_restarts_nothing() -> None:
    values = CASES["hub"].values()
    assert backends(render(values)) == [("alpha-0", 90), ("alpha-0-3", 10)]
    moved = CASES["hub"].values(percent=75)
    assert backends(render(moved)) == [("alpha-0", 25), ("alpha-0-3", 75)]
    before, after = documents(values), documents(moved)
    assert [key for key in before if before[key] != after[key]] == [("HTTPRoute", "demo-expo-serve")]
    assert before.keys() == after.keys()


def test_rolled_back_and_finished_as_the_comments_say() -> None:
    text, values = CASES["hub"].text(), CASES["hub"].values()
    assert "give alpha-0 all of the weight" in text
    back = {**values, "alias": {**values["alias"], "weights": {"alpha-0": 100, "alpha-0-3": 0}}}
    assert backends(render(back)) == [("alpha-0", 100), ("alpha-0-3", 0)]
    assert "take alpha-0 out of both maps" in text
    done = {**values, "alias": {**values["alias"], "weights": {"alpha-0-3": 100}}}
    done["variants"] = {"alpha-0-3": values["variants"]["alpha-0-3"]}
    kept = documents(done)
    assert {
        key: text for key, text in documents(values).items() if key[1].endswith("alpha-0-3")
    }.items() <= kept.items()


@every_case
def test_served_names_are_those_of_the_command_and_one_for_both(case: Case) -> None:
    assert case.config.pinned is not None
    short = case.config.pinned.named_after.short_name
    for name, pod in servers(case.values()).items():
        served = next(flag.values for flag in read_flags(pod.unknown) if flag.name == "served-model-name")
        assert served == (f"{short}-expo-{pod.config.alpha_text}", f"{short}-expo"), name


def test_alpha_zero_stands_alone() -> None:
    text, values = CASES["zero"].text(), CASES["zero"].values()
    assert list(values["variants"]) == ["alpha-0"]
    assert values["alias"]["weights"] == {"alpha-0": 100}
    assert "no other alpha was shown to help" in text
    assert "roll back" not in text


@pytest.mark.parametrize(
    ("alpha", "text"),
    [(0.1 + 0.2, "0.3"), (1 / 3, "0.333333333333"), (1234 + 1 / 3, "1234.3333333333"), (1e-5, "0.00001")],
)
def test_alphas_have_the_digits_that_the_chart_takes(alpha: float, text: str) -> None:
    case = Case(pinned(HUB["base"], HUB["aligned"]), alpha)
    pods = servers(case.values())
    assert pods[variant_name(text)].config.alpha_text == text
    assert read(case.command).config.alpha == alpha


@pytest.mark.parametrize("alpha", ["0", "-0.5", "10000", "0.333333333333"])
def test_names_of_variants_differ_as_their_alphas_do(alpha: str) -> None:
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", variant_name(alpha))
    assert variant_name("-0.5") != variant_name("0.5") != variant_name("05")


def test_volume_holds_what_is_on_the_hub() -> None:
    objects = render(CASES["hub"].values())
    job = pick(objects, "Job")["spec"]["template"]["spec"]["containers"][0]
    assert [f"org/{side}@{SHAS[side]}" in str(job) for side in ("base", "aligned", "delta")] == [True, True, False]
    assert pick(objects, "PersistentVolumeClaim")
    assert "EDIT: room for all sources" in CASES["hub"].text()


def test_folders_are_to_be_brought_onto_a_claim() -> None:
    text, objects = CASES["folders"].text(), render(CASES["folders"].values())
    assert not [one for one in objects if one["kind"] in ("Job", "PersistentVolumeClaim")]
    for side in ("base", "aligned"):
        assert (
            f'# EDIT: bring /data/{side} onto the volume as this folder.\n  {side}: "/models/{side}/{side}"\n' in text
        )
    assert "claimName: checkpoints" in yaml.safe_dump(objects)
    both = CASES["one-of-each"]
    assert "EDIT: bring /data/aligned" in both.text()
    assert [one["kind"] for one in render(both.values())].count("Job") == 1
    assert "existingClaim" in both.text()


def test_only_where_they_are_read_bin_files_are_downloaded() -> None:
    ours = yaml.safe_load((CHART / "values.yaml").read_text())["weights"]["download"]["exclude"]
    assert "exclude" not in CASES["hub"].values()["weights"]["download"]
    found = CASES["pickles"].values()["weights"]["download"]["exclude"]
    assert found == [pattern for pattern in ours if pattern != "*.bin"]


def test_a_source_without_a_commit_is_said() -> None:
    source = Source(name="org/base", path="/x", revision="main")
    case = Case(pinned(source, HUB["aligned"]))
    assert "EDIT: a source has no commit" in case.text()
    assert servers(case.values())["alpha-0"].config.base_revision == "main"


def test_on_cpu_the_pods_ask_for_the_weights() -> None:
    values = CASES["hub"].values(cpu_weight_bytes=2 << 30)
    (container,) = pick(render(values), "Deployment", "alpha-0")["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in str(container["resources"])
    assert values["defaults"]["device"] == "cpu"
    assert "nvidia.com/gpu" in str(render(CASES["hub"].values()))


SECRET = "hf_SomethingSecret"


@pytest.mark.parametrize("form", ["--{} {}", "--{}={}", "--{}\n{}"])
def test_secrets_are_not_repeated(form: str) -> None:
    """The command and the values are in sweep.json, and on a page that is passed on."""
    words = " ".join(form.format(flag, SECRET) for flag in ("hf-token", "hf_token", "api-key")).split()
    case = Case(pinned(HUB["base"], HUB["aligned"]), 0.3, tuple(words), {"hf-token": SECRET, "api_key": SECRET})
    command, text = deploy_command(case.config, case.alpha, case.arguments, case.file_options), case.text()
    assert SECRET not in command + text
    assert command.count('--hf-token "$HF_TOKEN"') == 3
    assert command.count('--api-key "$VLLM_API_KEY"') == 2
    assert text.count("Not taken over: --hf-token; the chart has weights.download.tokenSecret.") == 1
    assert render(case.values())


def refused_by_the_chart() -> list[str]:
    """The flags that the chart refuses among extraArgs."""
    text = (CHART / "templates/_validate.tpl").read_text()
    lists = re.findall(r"(?:\$ours := list|has \$flag \(list) ((?:\"[\w-]+\" ?)+)", text)
    names = {name for found in lists for name in re.findall(r'"([\w-]+)"', found)}
    assert {"tensor-parallel-size", "api-key", "data-parallel-size"} <= names
    return sorted(names)


OF_EXPO = {*options._SOURCE_FLAGS, *options._SET_BY_US, "revision", "pair", "status-port", "engine-timeout"}
"""Flags that are never among those for vLLM."""


@pytest.mark.parametrize("name", [name for name in refused_by_the_chart() if name not in OF_EXPO])
def test_what_the_chart_refuses_is_a_key_or_a_comment(name: str) -> None:
    flag = f"--{name}" if len(name) > 3 else f"-{name}"
    case = Case(pinned(HUB["base"], HUB["aligned"]), 0.3, ("--max-num-seqs=4", flag, "2"))
    pods = servers(case.values())
    assert all("--max-num-seqs=4" in pod.unknown for pod in pods.values())
    keys = set(canary._SIZES.values()) & set(case.values()["defaults"])
    assert bool(keys) != (f"Not taken over: --{name}; " in case.text())


def test_tls_is_left_to_the_gateway() -> None:
    case = Case(pinned(HUB["base"], HUB["aligned"]), 0.3, ("--ssl-keyfile", "k.pem"))
    assert "Not taken over: --ssl-keyfile; " in case.text()
    assert render(case.values())


def test_files_of_this_machine_are_pointed_out(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("")
    case = Case(pinned(HUB["base"], HUB["aligned"]), 0.3, ("--chat-template", str(template), "--max-num-seqs", "4"))
    assert "# EDIT: --chat-template names a file of this machine.\n" in case.text()
    assert "EDIT: --max-num-seqs" not in case.text()


@pytest.mark.parametrize("name", ['a"b', "a: b #c", "näme", "a\u2028b\x85c\x7f", "- a", "{a}", "x\ny"])
def test_odd_names_stay_one_value(name: str, tmp_path: Path) -> None:
    config = pinned(Source(name=name, path=f"/data/{name}"), FOLDERS["aligned"], alpha_rules=(f"{name}=0.5",))
    case = Case(config, 0.3, ("--stop", name))
    found = case.values()
    assert found["defaults"]["extraArgs"] == ["--stop", name]
    assert found["defaults"]["alphaRules"] == [f"{name}=0.5"]
    assert re.fullmatch(r"/models/base/[\w.-]+", found["defaults"]["base"])
    if "\n" not in name:  # the chart's pattern for a rule is of one line
        assert render(found)


@pytest.mark.engine
def test_switches_without_negation_are_those_of_vllm() -> None:
    from argparse import BooleanOptionalAction, _HelpAction

    from expo_serve.vllm_plugin import compat
    from expo_serve.vllm_plugin.server import flatten

    serve = compat.ServeSubcommand().subparser_init(
        compat.FlexibleArgumentParser(prog="vllm").add_subparsers(dest="subparser")
    )
    actions = {action for action in serve._option_string_actions.values() if action.nargs == 0}
    switches = {action for action in actions if not isinstance(action, BooleanOptionalAction | _HelpAction)}
    assert {action.option_strings[0].lstrip("-") for action in switches} == WITHOUT_NEGATION
    given = {
        "dtype": "auto",
        "enforce-eager": False,
        "disable-log-stats": False,
        "grpc": True,
        "hf-overrides": {"a": 1},
    }
    assert [word for flag in read_flags([], given) for word in flag.words] == flatten(
        given, set(serve._option_string_actions)
    )
