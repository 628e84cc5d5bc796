"""What is wrong with a configuration, in one line that names the flag and the cure."""

import re

from pydantic import ValidationError


class ConfigError(Exception):
    """The server cannot start as asked. The message is one line: which flag, and the cure."""


def describe_value(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    path = ".".join(str(part) for part in first["loc"])
    if not path:
        return one_line(message)
    flag = "--" + path.replace("_", "-")
    if first["type"] == "extra_forbidden":
        return f"{flag}: there is no such setting; --help lists them"
    return one_line(f"{flag}: {message[:1].lower()}{message[1:]}")


def describe_settings(message: str) -> str:
    """What argparse and pydantic-settings say, with the flag first and the cure last."""
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        return f"{unknown[1]}: there is no such flag; --help lists them"
    if argument := re.search(r"argument (--\S+): (.*)", message):
        return f"{argument[1]}: {argument[2]}"
    if field := re.search(r'value for field "(\w+)"', message):
        return f"--{field[1].replace('_', '-')}: cannot be read; give valid JSON, or one dotted flag per key"
    return message


def one_line(text: str) -> str:
    return " ".join(text.split())
