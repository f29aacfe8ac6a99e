"""The completions of bash, zsh and fish, made from the parsers of the command lines.

Only what the parsers know is offered, and file names. Not the names of exports: these come from outside, and a shell
expands what it is given.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

NOTICE = "made from the command line's parser by tests/completions.py"

# In each script, `path` is the command so far, such as "manifest create", and "" before it.
_BASH = """\
# Completion of {program} for bash; {notice}.
_{program}() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} path= words= index
    for ((index = 1; index < COMP_CWORD; index++)); do
        case "${{path:+$path }}${{COMP_WORDS[index]}}" in
        {commands})
            path=${{path:+$path }}${{COMP_WORDS[index]}} ;;
        esac
    done
    case "$path $previous" in
    {anything})
        ;;
{values}    *)
        case "$path:$current" in
{words}        esac ;;
    esac
    # Where nothing is offered, bash offers file names.
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}}
complete -o default -F _{program} {program}
"""

_ZSH = """\
#compdef {program}
# Completion of {program} for zsh; {notice}.
local path_= index
for ((index = 2; index < CURRENT; index++)); do
    case "${{path_:+$path_ }}${{words[index]}}" in
    {commands})
        path_=${{path_:+$path_ }}${{words[index]}}
        # What comes before a command's own words is not for _arguments.
        words=("${{(@)words[index,-1]}}")
        CURRENT=$((CURRENT - index + 1))
        index=1 ;;
    esac
done
local -a offered
case "$path_" in
{words}esac
"""


def scripts(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The completion scripts of a program, by the names of their files, below a directory for each shell."""
    return {
        f"bash/{parser.prog}": _bash(parser),
        f"fish/{parser.prog}.fish": _fish(parser),
        f"zsh/_{parser.prog}": _zsh(parser),
    }


def _levels(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser with its path, from the top: that of the program, of each command, of the commands in a group."""
    yield path, parser
    for name, inner, _ in _choices(parser):
        yield from _levels(inner, f"{path} {name}".strip())


def _choices(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser, str]]:
    """The commands of a group: name, parser, help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [(about.dest, action.choices[about.dest], about.help or "") for about in action._choices_actions]
    return []


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def _bash(parser: argparse.ArgumentParser) -> str:
    levels = dict(_levels(parser))
    anything, values, words = [], "", ""
    for path, level in levels.items():
        for action in _options(level):
            patterns = [f'"{path} {name}"' for name in action.option_strings]
            if action.choices:
                values += f'    {" | ".join(patterns)})\n        words="{_one_of(action)}" ;;\n'
            elif action.nargs != 0:
                anything += patterns
        choices = [name for name, _, _ in _choices(level)]
        every = [*choices, *(name for action in _options(level) for name in action.option_strings)]
        words += f'        "{path}":{"" if choices else "-"}*) words="{" ".join(every)}" ;;\n'
    return _BASH.format(
        program=parser.prog,
        notice=NOTICE,
        commands=" | ".join(f'"{path}"' for path in levels if path),
        anything=" | ".join(anything),
        values=values,
        words=words,
    )


def _one_of(action: argparse.Action) -> str:
    return " ".join(map(str, action.choices or ()))


def _zsh(parser: argparse.ArgumentParser) -> str:
    levels = dict(_levels(parser))
    words = ""
    for path, level in levels.items():
        arguments = "".join(f" \\\n        {_quoted(spec)}" for spec in _zsh_specs(level))
        if choices := _choices(level):
            offered = " ".join(_quoted(f"{name}:{_plain(about)}") for name, _, about in choices)
            arguments += " \\\n        '1:command:->command'"
            after = f"\n    [[ $state != command ]] || {{ offered=({offered}); _describe command offered }}"
            words += f"'{path}')\n    local state\n    _arguments{arguments}{after} ;;\n"
        else:
            words += f"'{path}')\n    _arguments{arguments} \\\n        '*:file:_files' ;;\n"
    return _ZSH.format(
        program=parser.prog, notice=NOTICE, commands=" | ".join(f"'{path}'" for path in levels if path), words=words
    )


def _zsh_specs(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in _options(parser):
        about = re.sub(r"([\[\]:])", r"\\\1", _plain(action.help or ""))
        value = ""
        if action.nargs != 0:
            value = f":{action.dest}:({_one_of(action)})" if action.choices else f":{action.dest}:_files"
        for name in action.option_strings:
            yield f"{'*' * isinstance(action, argparse._AppendAction)}{name}[{about}]{value}"


def _fish(parser: argparse.ArgumentParser) -> str:
    text = f"# Completion of {parser.prog} for fish; {NOTICE}.\n"
    for path, level in _levels(parser):
        seen = [f"__fish_seen_subcommand_from {word}" for word in path.split()]
        choices = _choices(level)
        names = " ".join(name for name, _, _ in choices)
        here = "; and ".join([*seen, *([f"not __fish_seen_subcommand_from {names}"] if choices else [])])
        when = f"complete -c {parser.prog} -n {_quoted(here)}"
        for name, _, about in choices:
            text += f"{when} -f -a {name} -d {_quoted(_plain(about))}\n"
        for action in _options(level):
            marks = [f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in action.option_strings]
            value = f" -x -a {_quoted(_one_of(action))}" if action.choices else " -r -F" * (action.nargs != 0)
            text += f"{when} {' '.join(marks)}{value} -d {_quoted(_plain(action.help or ''))}\n"
    return text


def _plain(text: str) -> str:
    return " ".join(text.replace("%%", "%").replace("'", "’").split())


def _quoted(text: str) -> str:
    """As one word in single quotes, which all three shells understand alike as long as it has none."""
    return f"'{text}'"
