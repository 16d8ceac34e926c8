"""Shapes in docstrings are contracts: every documented function is wrapped and checked while a set is sampled.

A line `name: (B, I, D) meaning` binds letters to sizes for one call; `Returns (B, L, D)` must agree with them.
Sizes may be numbers, letters or arithmetic on letters, such as K/2 or h/8 * w/8.
"""

import functools
import inspect
import re
import sys
from fractions import Fraction

import pytest
import torch

import iclora.layout
import iclora.pipeline
import iclora.references
import model.autoencoder
import model.flux
import model.position
import model.text
import sample
import sampling.denoise
import sampling.flow
import sampling.images
import sampling.inpaint
import sampling.latents
from golden import AE, FLUX, case
from model.weights import examples_folder, load_autoencoder, load_flux

MODULES = [model.flux, model.position, model.autoencoder, model.text]
MODULES += [sampling.flow, sampling.denoise, sampling.latents, sampling.inpaint, sampling.images, iclora.layout]
MODULES += [iclora.pipeline, iclora.references]
PACKAGES = ("model", "sampling", "iclora", "sample")
ARGUMENT = re.compile(r"(?:^\s*|, )([a-z_]\w*(?:, [a-z_]\w*)*): (\([^()]+\))", re.M)
FREE = {"h", "w"}  # sizes of pictures, which some functions take from an object and not from an argument
SHAPE = re.compile(r"\((?=[^()]*,)[^()]+\)")


def contracts(function):
    """The shapes a docstring promises: of arguments by name, and of the results in order."""
    doc = function.__doc__ or ""
    arguments, _, returns = re.sub(r"\breturns:?\b|\bReturns\b", "RETURNS", doc).partition("RETURNS")
    promised = {}
    for names, shape in ARGUMENT.findall(arguments):
        promised |= dict.fromkeys(names.split(", "), shape)
    known = {name: shape for name, shape in promised.items() if name in inspect.signature(function).parameters}
    first_line = returns.partition("Errors")[0].partition("Source")[0]
    return known, SHAPE.findall(first_line)


def sizes(shape):
    return [part.strip() for part in shape.strip("()").split(",") if part.strip()]


def solve(text, size, letters, where):
    """The size that an expression stands for. One unknown letter is bound by it; two are allowed for h and w only."""
    expression = re.sub(r"(\d)([A-Za-z])", r"\1*\2", text)
    unknown = set(re.findall(r"[A-Za-z]\w*", expression)) - letters.keys()

    def value(**more):
        known = {name: Fraction(number) for name, number in {**letters, **more}.items()}
        return eval(expression, {"__builtins__": {}}, known)  # our own docstring

    if len(unknown) == 1:  # linear in the letter
        (name,) = unknown
        least = value(**{name: 0})
        letters[name] = (size - least) / (value(**{name: 1}) - least)
        assert letters[name].denominator == 1 and letters[name] >= 0, f"{where}: {text} cannot be {size}"
    elif unknown:
        assert unknown == FREE, f"{where}: nothing says how large {text} is"
        return size
    return value()


def compare(tensor, shape, letters, where):
    """Check one tensor, binding letters that are new and computing expressions whose letters are known."""
    want = sizes(shape)
    assert tensor.ndim == len(want), f"{where}: {tuple(tensor.shape)} is documented as {shape}"
    for size, text in zip(tensor.shape, want, strict=True):
        if re.fullmatch(r"[A-Za-z]\w*", text):
            text_size = letters.setdefault(text, size)
        else:
            text_size = solve(text, size, letters, where)
        assert size == text_size, f"{where}: {tuple(tensor.shape)} is documented as {shape} with {letters}"


def checked(function, seen):
    arguments, results = contracts(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        letters = {}
        bound = inspect.signature(function).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if isinstance(value, int):
                letters[name] = value
        for name, shape in arguments.items():
            if isinstance(bound.arguments.get(name), torch.Tensor):
                compare(bound.arguments[name], shape, letters, f"{function.__qualname__} {name}")
        output = function(*args, **kwargs)
        outputs = output if isinstance(output, tuple | list) else [output]
        shapes = results * len(outputs) if len(results) == 1 else results
        for tensor, shape in zip(outputs, shapes, strict=False):
            if isinstance(tensor, torch.Tensor):
                compare(tensor, shape, letters, f"{function.__qualname__} returns")
        seen.add(function.__qualname__)
        return output

    return wrapper


def documented():
    """Every function and method of the modules above whose docstring holds a shape."""
    for module in MODULES:
        for owner in [module, *(c for c in vars(module).values() if inspect.isclass(c))]:
            if getattr(owner, "__module__", module.__name__) != module.__name__:
                continue
            for name, function in list(vars(owner).items()):
                if inspect.isfunction(function) and function.__module__ == module.__name__ and any(contracts(function)):
                    yield owner, name, function


@pytest.fixture
def seen(monkeypatch):
    """Wrap every documented function wherever it was imported, and collect the names of those that ran."""
    ran = set()
    ours = [m for n, m in list(sys.modules.items()) if n.split(".")[0] in PACKAGES and m is not None]
    for owner, name, function in documented():
        wrapper = checked(function, ran)
        monkeypatch.setattr(owner, name, wrapper)
        for module in ours:
            for alias, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, alias, wrapper)
    return ran


def test_every_documented_shape_holds_in_a_sampling_run(seen, tmp_path):
    references = [str(examples_folder() / "references" / name) for name in ("cat.png", "robot.png")]
    command = ["--grid", "2x2", "--mask", "3", "--steps", "2", "--out", str(tmp_path), "--ref", *references]
    assert sample.main(command) == 0
    sampling.inpaint.keep_clean(torch.zeros(1, 4, 64), torch.ones(1, 4, 1))
    iclora.layout.panel_attention_mask(iclora.layout.Layout(1, 2, 32, 16), 3)
    iclora.references.encode_posterior(load_autoencoder(AE), torch.zeros(1, 3, 16, 32))
    case_of = case("dev")
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    given = {name: case_of[name] for name in names}
    load_flux(FLUX["dev"], dtype=torch.float32)(**given)
    apart = {"img": given["img"][:, 2:], "refs": given["img"][:, :2], "isolate_refs": True}
    load_flux(FLUX["dev"], dtype=torch.float32)(**given | apart)
    golden = case("ae")
    autoencoder = load_autoencoder(AE)
    with torch.no_grad():
        model.autoencoder.decode_tiled(autoencoder, golden["z"], tile=4, overlap=1)
        autoencoder.encode(golden["image"])
    names = {function.__qualname__ for _, _, function in documented()}
    assert len(names) > 20
    unseen = {"interpolate"} & (names - seen)
    assert not names - seen - unseen, "documented shapes that the run did not check"


def test_a_wrong_docstring_is_noticed():
    def double(x):
        """Doubles.

        x: (B, D) numbers
        Returns (B, 2D) twice as many
        """
        return torch.cat((x, x), dim=0)

    with pytest.raises(AssertionError, match="documented as"):
        checked(double, set())(torch.zeros(2, 3))
