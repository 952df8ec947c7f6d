"""Tool definitions as the TypeScript namespace that gpt-oss was trained on.

The layout, quirks included (keys are not indented at the top, an object's description stands
twice), is that of OpenAI's harmony renderer, since every difference is unknown to the model.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]
_SIMPLE = {"number": "number", "integer": "number", "boolean": "boolean"}


def namespace(tools: Sequence[Mapping[str, Any]], name: str = "functions") -> str:
    """The `# Tools` section of a developer message for OpenAI-style tool definitions."""
    lines = [f"## {name}\n", f"namespace {name} {{\n"]
    for tool in tools:
        function = tool["function"]
        lines += [f"// {line}" for line in str(function.get("description") or "").splitlines()]
        parameters = function.get("parameters")
        argument = f"_: {_type(parameters, '')}" if isinstance(parameters, Mapping) else ""
        lines.append(f"type {function['name']} = ({argument}) => any;\n")
    lines.append(f"}} // namespace {name}")
    return "# Tools\n\n" + "\n".join(lines)


def _type(schema: Schema, indent: str) -> str:
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        return "".join(_variant(variant, indent) for variant in variants)
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_SIMPLE.get(k, k) for k in kind if isinstance(k, str)) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        items = schema.get("items")
        return f"{_type(items, indent)}[]" if isinstance(items, Mapping) else "Array<any>"
    if kind == "string":
        values = [f'"{v}"' for v in schema.get("enum") or () if isinstance(v, str)]
        return " | ".join(values) or "string"
    return _SIMPLE.get(str(kind), "any")


def _variant(schema: Schema, indent: str) -> str:
    notes = [str(schema["description"])] if schema.get("description") else []
    notes += _default(schema)
    kind = _nullable(schema, indent + "   ")
    return f"\n{indent} | {kind}" + (f" // {' '.join(notes)}" if notes else "")


def _object(schema: Schema, indent: str) -> str:
    lines = []
    if isinstance(schema.get("description"), str):
        lines.append(f"{indent}// {schema['description']}")
    lines.append("{")
    required = schema.get("required") or ()
    for key, value in (schema.get("properties") or {}).items():
        value = value if isinstance(value, Mapping) else {}
        name = key if key in required else f"{key}?"
        lines += _comments(value, indent)
        if isinstance(value.get("oneOf"), list):
            lines += _alternatives(name, value, indent)
        else:
            default = "".join(f" // {note}" for note in _default(value))
            lines.append(f"{indent}{name}: {_nullable(value, indent + '    ')},{default}")
    lines.append(f"{indent}}}")
    return "\n".join(lines)


def _comments(schema: Schema, indent: str) -> list[str]:
    lines = []
    if isinstance(schema.get("title"), str):
        lines += [f"{indent}// {schema['title']}", f"{indent}//"]
    if isinstance(schema.get("description"), str) and not isinstance(schema.get("oneOf"), list):
        lines.append(f"{indent}// {schema['description']}")
    examples = [e for e in schema.get("examples") or () if isinstance(e, str)]
    if examples:
        lines.append(f"{indent}// Examples:")
        lines += [f'{indent}// - "{example}"' for example in examples]
    return lines


def _alternatives(name: str, schema: Schema, indent: str) -> list[str]:
    """A property that may be one of several types: a line for each."""
    variants = [v for v in schema["oneOf"] if isinstance(v, Mapping)]
    described = schema.get("description")
    repeats = bool(variants) and variants[0].get("description") == described
    lines = [f"{indent}// {described}"] if described and not repeats else []
    above = bool(lines)
    lines += [f"{indent}// {note}" for note in _default(schema)]
    lines.append(f"{indent}{name}:")
    for n, variant in enumerate(variants):
        notes = []
        own = variant.get("description")
        if own and own != described and not (n == 0 and above):
            notes.append(str(own))
        notes += _default(variant)
        comment = f" // {' '.join(notes)}" if notes else ""
        lines.append(f"{indent} | {_nullable(variant, indent + '   ')}{comment}")
    return [*lines, f"{indent},"]


def _nullable(schema: Schema, indent: str) -> str:
    kind = _type(schema, indent)
    return f"{kind} | null" if schema.get("nullable") is True and "null" not in kind else kind


def _default(schema: Schema) -> list[str]:
    if "default" not in schema:
        return []
    value = schema["default"]
    if isinstance(value, str):
        return [f"default: {value}" if schema.get("enum") else f'default: "{value}"']
    return ["default: " + json.dumps(value, ensure_ascii=False, separators=(",", ":"))]
