"""A machine by whatever people call it: a bundled name, a profile of their own, or its parts.

Modelled: one way in for every command, with the serving engine where the machine is made of parts. Ignored: changes a command
line makes afterwards.
"""

from __future__ import annotations

from ...base.errors import InputError, UnknownName
from .catalogue import gpu_parts
from .compose import compose_text
from .notation import is_parts
from .profile import Profile
from .profile_file import list_hardware, load_hardware


def load_machine(text: str, engine: str | None = None, backend: str | None = None) -> Profile:
    """Return the profile of a bundled machine, of a file, or of parts joined by "+".

    engine, backend: of a machine made of parts; other profiles' constants are of the software they were measured with. Raises
    UnknownName or InputError.
    """
    whole = text in list_hardware() and engine is None and backend is None
    if is_parts(text) and not whole:
        return compose_text(text, engine, backend)
    try:
        profile = load_hardware(text)
    except UnknownName as error:
        known = {*list_hardware(), *gpu_parts()}
        raise UnknownName(
            error.field, error.value, known, more="a machine is written by its parts: 4090 + 7950X + 64GB DDR5-6000"
        ) from None
    if engine is not None or backend is not None:
        own = profile.engine.name if profile.engine is not None else "the software that its constants were taken from"
        if (
            profile.engine is None
            or engine not in (None, profile.engine.name)
            or backend not in (None, profile.engine.backend)
        ):
            raise InputError("--engine", engine or backend, f"{profile.name} is a whole machine under {own}",
                             "describe the machine by its parts, e.g. rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB")  # fmt: skip
    return profile


def engine_note(profile: Profile) -> str:
    """Return which engine a prediction is of, for the answer."""
    if profile.engine is None:
        return f"as {profile.name}'s constants have it"
    measured = "" if profile.kernels is None else f"; kernels as measured, of {profile.kernels.version}"
    return f"{profile.engine.name} ({profile.engine.backend}), {profile.engine.version}{measured}"
