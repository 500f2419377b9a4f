"""Explain a config by the declarations of its settings: one key's sentence, tables of the reference, JSON schema."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from lavis.common.registry import registry

from lavis_cir_plugin.core.settings import REQUIRED, Setting, plain_value, settings_of
from lavis_cir_plugin.training import config
from lavis_cir_plugin.training.lora import LoraRun
from lavis_cir_plugin.training.resumable_runner import ResumableRunner
from lavis_cir_plugin.training.run_settings import DatasetSection, LavisModel, LavisRun

_Classes = Sequence[type]


def sections() -> dict[str, _Classes]:
    """Return the classes of every section of this package by its name, such as ``run.wrf`` or ``model clip_cir``."""
    kinds = [ResumableRunner, *_ours("runner").values(), *_ours("task").values()]
    readers = dict.fromkeys([LoraRun, *(entry.RUN_SETTINGS for entry in kinds)])
    # A task's section that another one extends is the other one's first part.
    most = [cls for cls in readers if not any(other is not cls and issubclass(other, cls) for other in readers)]
    found: dict[str, _Classes] = {"run": [LavisRun, *most]}
    for setting in _merged(most).values():
        if setting.section is not None:
            found[f"run.{setting.name}"] = [setting.section]
    found.update({f"model {name}": [LavisModel, cls] for name, cls in _ours("model").items()})
    found["datasets"] = [DatasetSection]
    for name, builder in _ours("builder").items():
        if hasattr(builder, "benchmark_module"):
            found[f"datasets.{name}.build_info"] = [builder.benchmark_module.CONFIG]
        if getattr(builder, "world", None) is not None:
            found[f"datasets.{name}.garments"] = [builder.world.settings]
    found.update({f"processor {name}": [cls] for name, cls in _ours("processor").items()})
    return found


def meaning_of(key: str, complete: Any) -> str:
    """Return the first sentence on a key of a complete config, and "" where nothing is known about it.

    Args:
        key: Dotted name; below a value that is no section of ours, it has the meaning of that value.
        complete: The whole config, with its defaults.
    """
    section, *names = key.split(".")
    settings: Mapping[str, Setting] = {}
    if section == "run":
        settings = _merged(config.run_sections(complete["run"]))
    elif section == "model":
        cls = registry.get_model_class(complete["model"]["arch"])
        settings = _merged([LavisModel, cls] if cls in _ours("model").values() else [])
    elif section == "datasets" and names and names[0] in _ours("builder"):
        return _meaning_in_dataset(names[0], names[1:], complete["datasets"])
    return _meaning(settings, names)


def _meaning_in_dataset(name: str, names: Sequence[str], datasets: Mapping[str, Any]) -> str:
    found = sections()
    if len(names) > 2 and names[0] == "vis_processor":
        processor = datasets[name]["vis_processor"][names[1]]
        cls = found.get(f"processor {(processor or {}).get('name')}", [])
        return _meaning(_merged(cls), names[2:]) or _meaning(settings_of(DatasetSection), names)
    own = found.get(f"datasets.{name}.{names[0]}") if len(names) > 1 else None
    return _meaning(_merged(own), names[1:]) if own else _meaning(settings_of(DatasetSection), names)


def _meaning(settings: Mapping[str, Setting], names: Sequence[str]) -> str:
    if not names or names[0] not in settings:
        return ""
    setting = settings[names[0]]
    inner = _meaning(settings_of(setting.section), names[1:]) if setting.section is not None else ""
    return inner or re.split(r"(?<=\.) (?=[A-Z`])", markdown(setting.meaning), maxsplit=1)[0]


def table(classes: _Classes) -> str:
    """Return the Markdown table of a section's settings: key, default, what is allowed, meaning."""
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for setting in _merged(classes).values():
        default = "required" if setting.default is REQUIRED else f"`{_as_yaml(setting)}`"
        cells = (f"`{setting.name}`", default, setting.allowed, markdown(setting.meaning))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def with_tables(page: str) -> str:
    """Return a Markdown page with a section's table after each line ``<!-- settings: SECTION -->``.

    Raises:
        KeyError: If there is no such section.
    """
    found = sections()
    written = re.sub(
        r"^(<!-- settings: (.*) -->)\n\n(?:\|.*\n)*\n*",
        lambda place: f"{place[1]}\n\n{table(found[place[2]])}\n\n",
        page,
        flags=re.MULTILINE,
    )
    return written.rstrip("\n") + "\n"


def markdown(text: str) -> str:
    """Return a docstring's sentences as Markdown: names and formulas as code."""
    text = re.sub(r":math:`([^`]*)`", r"$`\1`$", text)
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?([^`]*)`", r"`\1`", text)
    return text.replace("``", "`")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of project files, for the completion and checks of editors.

    Keys of models, tasks and data sets of other packages are let through.
    """
    found = sections()
    models = [
        {"if": {"properties": {"arch": {"const": name}}}, "then": _object(found[f"model {name}"], is_closed=True)}
        for name in _ours("model")
    ]
    datasets = {}
    for name in _ours("builder"):
        one = _object(found["datasets"], is_closed=True)
        for key in ("build_info", "garments"):
            if f"datasets.{name}.{key}" in found:
                one["properties"][key] = _nullable(_object(found[f"datasets.{name}.{key}"], is_closed=True))
        datasets[name] = one
    arch = {"arch": {"enum": registry.list_models()}}
    run = _object(found["run"], is_closed=False)
    for key, names in {"task": registry.list_tasks(), "runner": registry.list_runners()}.items():
        run["properties"][key]["enum"] = names
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Project file of LAVIS with lavis_cir_plugin",
        "type": "object",
        "required": ["model", "datasets", "run"],
        "properties": {
            "model": {"type": "object", "properties": arch, "allOf": models},
            "datasets": {"type": "object", "properties": datasets},
            "run": run,
        },
    }


def _object(classes: _Classes, is_closed: bool) -> dict[str, Any]:
    properties = {name: _property(setting) for name, setting in _merged(classes).items()}
    return {"type": "object", "properties": properties, "additionalProperties": not is_closed}


def _property(setting: Setting) -> dict[str, Any]:
    if setting.section is not None:
        return _nullable(_object([setting.section], is_closed=True))
    from pydantic.json_schema import GenerateJsonSchema

    allowed = GenerateJsonSchema().generate(setting.schema)  # type: ignore[arg-type]
    default = {} if setting.default is REQUIRED else {"default": plain(setting.default)}
    return {**allowed, **default, "description": f"{markdown(setting.meaning)} Allowed: {setting.allowed}."}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": ["object", "null"]}


def plain(value: Any) -> Any:
    """Return a default in types that YAML and JSON have."""
    return list(value) if isinstance(value, tuple) else plain_value(value)


def _as_yaml(setting: Setting) -> str:
    value = {} if setting.section is not None and setting.default is not None else plain(setting.default)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _merged(classes: Iterable[type]) -> dict[str, Setting]:
    """Return the settings of several classes of one section; a later class says more about a key of an earlier one."""
    return {name: setting for cls in classes for name, setting in settings_of(cls).items()}


def _ours(kind: str) -> dict[str, Any]:
    """Return this package's registered classes of a kind, such as ``model``, by name."""
    entries = registry.mapping[f"{kind}_name_mapping"].items()
    return {name: entry for name, entry in sorted(entries) if config.is_ours(entry)}
