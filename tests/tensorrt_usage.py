"""Which names of TensorRT a source file touches, read off its syntax tree.

The module object is called ``trt``. What comes from it is followed through assignments; where that
is not possible (parameters, attributes of other objects), the name of a variable says what it is:
see `tensorrt_objects`. What is annotated with another type, or made by another class, is none of
TensorRT's.

A name that not every version has is asked for with ``getattr(trt.BuilderFlag, "FP4", None)``, or
used only inside ``if hasattr(trt.BuilderFlag, "FP4"):``.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tensorrt_api import CLASSES, MODULE, Names
from tensorrt_objects import EVERYDAY, GIVES, MODULES, NAMES, PLAIN


@dataclass(frozen=True)
class Use:
    """A name of TensorRT, and where it is touched.

    Attributes:
        owner: The class, or `MODULE`.
        name: Its member; with ``*`` for a part that is computed.
        line: In the source.
        guarded: Whether the code copes without it.
    """

    owner: str
    name: str
    line: int
    guarded: bool


@dataclass(frozen=True)
class _Value:
    """What an expression is: an object of a class, the class itself, or a member not yet called."""

    owner: str
    name: str = ""  # of the member
    is_class: bool = False


_FOREIGN = _Value("foreign")  # an object of somebody else's class
_UNTYPED = ("Any", "object", "types.ModuleType", "ModuleType")
_Scope = dict[str, _Value | None]  # None: a module, function or class of somebody else


def uses(source: str) -> tuple[list[Use], list[str]]:
    """Every touched name, and what could not be made out."""
    tree = ast.parse(source)
    names = NAMES
    if not any(_called(node) in MODULES for node in ast.walk(tree)):
        names = {name: owner for name, owner in NAMES.items() if name not in EVERYDAY}
    reader = _Reader(names)
    reader.visit(tree)
    return list(reader.uses), list(reader.problems)


def judge(found: list[Use], api: Mapping[str, Names]) -> list[str]:
    """What is wrong with the names in ``found`` for the versions in ``api``."""
    problems = []
    for use in found:
        if use.owner != MODULE and use.owner not in CLASSES:
            problems.append(
                f"line {use.line}: the members of {use.owner} are not listed: see "
                "tests/tensorrt_api.py"
            )
            continue
        # A version without the class has been judged where the class was touched.
        known = {version: names for version, names in api.items() if use.owner in names}
        having = [version for version, names in known.items() if _has(names[use.owner], use.name)]
        lacking = [version for version in known if version not in having]
        title = f"line {use.line}: {use.owner}.{use.name}"
        if not having:
            problems.append(f"{title} exists in none of {', '.join(api)}")
        elif lacking and not use.guarded:
            problems.append(f"{title} is not in {', '.join(lacking)}: ask with getattr or hasattr")
    return problems


def _called(node: ast.AST) -> str:
    """The name that a node reads or declares; of attributes, whether it is ``trt``."""
    if isinstance(node, ast.Attribute):
        return node.attr.lstrip("_") if node.attr.lstrip("_") == "trt" else ""
    return node.id if isinstance(node, ast.Name) else getattr(node, "arg", None) or ""


def _has(names: frozenset[str], name: str) -> bool:
    before, star, after = name.partition("*")
    if not star:
        return name in names
    return any(n.startswith(before) and n.endswith(after) for n in names)


class _Reader(ast.NodeVisitor):
    """Walks statements in order, with what each variable holds."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.uses: dict[Use, None] = {}
        self.problems: dict[str, None] = {}
        self.scope: _Scope = {}
        self.fields: _Scope = {}  # attributes of ``self`` in the class around
        self.guards: frozenset[tuple[str, str]] = frozenset()

    # What gives a name a value.

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            is_trt = alias.name in ("tensorrt", "tensorrt_rtx")
            self.scope[name] = _Value(MODULE) if is_trt else None

    visit_ImportFrom = visit_Import  # noqa: N815

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.scope[node.name] = None
        arguments = node.args
        for outside in (*node.decorator_list, *arguments.defaults, *arguments.kw_defaults):
            if outside is not None:
                self.visit(outside)
        inner = dict(self.scope)
        for argument in (
            *(*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs),
            *filter(None, (arguments.vararg, arguments.kwarg)),
        ):
            inner.pop(argument.arg, None)
            if argument.annotation is not None:
                self.annotate(inner, argument.arg, argument.annotation)
        self.inside(node.body, inner)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.inside([node.body], self.scope | dict.fromkeys((a.arg for a in node.args.args), None))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope[node.name] = None
        for outside in (*node.bases, *node.decorator_list):
            self.visit(outside)
        outer, self.fields = self.fields, {}
        known = dict(self.uses), dict(self.problems)
        self.inside(node.body, dict(self.scope))  # once to see what attributes hold
        for inner in ast.walk(node):
            if isinstance(inner, ast.AnnAssign):
                target = inner.target
                name = target.attr if isinstance(target, ast.Attribute) else ast.unparse(target)
                self.annotate(self.fields, name, inner.annotation)
        self.uses, self.problems = known
        self.inside(node.body, dict(self.scope))
        self.fields = outer

    def inside(self, statements: Sequence[ast.AST], scope: _Scope) -> None:
        outer, self.scope = self.scope, scope
        for statement in statements:
            self.visit(statement)
        self.scope = outer

    def annotate(self, scope: _Scope, name: str, annotation: ast.expr) -> None:
        text = ast.unparse(annotation).strip("'").removesuffix(" | None")
        if text.startswith("trt."):
            scope[name] = _Value(text.removeprefix("trt."))
        elif text not in _UNTYPED:
            scope[name] = _FOREIGN

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign([node.target], node.value)
        if isinstance(node.target, ast.Name):
            self.annotate(self.scope, node.target.id, node.annotation)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.assign(node.targets, node.value)

    def visit_withitem(self, node: ast.withitem) -> None:
        value = self.of(node.context_expr)
        if node.optional_vars is not None:
            self.bind(node.optional_vars, value)

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        iterated = self.of(node.iter)
        of_others = iterated is not None and self.given(iterated) in (PLAIN, _FOREIGN.owner)
        for target in ast.walk(node.target):
            if isinstance(target, ast.Name):
                self.bind(target, _FOREIGN if of_others else None)
        for part in (*node.body, *node.orelse) if isinstance(node, ast.For) else node.ifs:
            self.visit(part)

    visit_comprehension = visit_For

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        self.inside([*node.generators, node.elt], dict(self.scope))

    visit_SetComp = visit_GeneratorExp = visit_ListComp  # noqa: N815

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self.inside([*node.generators, node.key, node.value], dict(self.scope))

    def assign(self, targets: list[ast.expr], value: ast.expr) -> None:
        first = targets[0]
        if (
            isinstance(value, ast.Tuple)
            and isinstance(first, ast.Tuple)
            and not any(isinstance(part, ast.Starred) for part in (*first.elts, *value.elts))
        ):
            for target, part in zip(first.elts, value.elts, strict=True):
                self.assign([target], part)
            return
        held = self.of(value)
        for target in targets:
            self.bind(target, held)

    def bind(self, target: ast.expr, value: _Value | None) -> None:
        """Remember what a variable holds; a value that says nothing leaves it to its name."""
        if isinstance(target, ast.Name):
            self.scope.pop(target.id, None)
            if value is not None:
                self.scope[target.id] = value
        elif isinstance(target, ast.Attribute):
            if value is not None and ast.unparse(target.value) == "self":
                self.fields.setdefault(target.attr, value)
            self.of(target)

    # Conditions that ask whether a name is there.

    def visit_If(self, node: ast.If | ast.While) -> None:
        self.visit(node.test)
        with self.knowing(node.test):
            for statement in node.body:
                self.visit(statement)
        for statement in node.orelse:
            self.visit(statement)

    visit_While = visit_If  # noqa: N815

    @contextlib.contextmanager
    def knowing(self, test: ast.expr) -> Iterator[None]:
        """Inside, what ``test`` has asked for is there."""
        outer, self.guards = self.guards, self.guards | self.asked(test)
        yield
        self.guards = outer

    def asked(self, test: ast.expr) -> frozenset[tuple[str, str]]:
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return frozenset().union(*map(self.asked, test.values))
        if isinstance(test, ast.Call) and ast.unparse(test.func) == "hasattr":
            owner, name = self.of(test.args[0]), _text(test.args[1])
            if owner is not None and name is not None:
                return frozenset({(self.given(owner), name)})
        return frozenset()

    # What reads a name.

    def visit_Attribute(self, node: ast.expr) -> None:
        self.of(node)

    visit_BoolOp = visit_Call = visit_IfExp = visit_NamedExpr = visit_Attribute  # noqa: N815

    def of(self, node: ast.expr) -> _Value | None:
        """What an expression is; every name of TensorRT in it is noted."""
        if isinstance(node, ast.Name):
            owner = self.names.get(node.id.lstrip("_"))
            return self.scope.get(node.id, _Value(owner) if owner else None)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.NamedExpr):
            value = self.of(node.value)
            self.bind(node.target, value)
            return value
        if isinstance(node, ast.IfExp):
            self.visit(node.test)
            with self.knowing(node.test):
                value = self.of(node.body)
            return value or self.of(node.orelse)
        if isinstance(node, ast.BoolOp):
            with contextlib.ExitStack() as stack:
                values = []
                for part in node.values:
                    values.append(self.of(part))
                    if isinstance(node.op, ast.And):
                        stack.enter_context(self.knowing(part))
            return next(filter(None, values), None)
        if isinstance(node, ast.Subscript):
            self.visit(node.slice)
            return _FOREIGN if self.of(node.value) == _FOREIGN else None
        self.visit(node)
        return None

    def attribute(self, node: ast.Attribute) -> _Value | None:
        base, name = self.of(node.value), node.attr.lstrip("_")
        known = isinstance(node.value, ast.Name) and node.value.id in self.scope
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            if node.attr in self.fields:
                return self.fields[node.attr]
        elif base == _FOREIGN and name in self.names and name not in EVERYDAY:
            pass  # somebody else's object that holds one of TensorRT's
        elif base is not None:
            return self.member(base, node.attr, node, guarded=False)
        elif known:
            return None  # of a module or class of somebody else
        # A version is called ``release.tensorrt``; only what is imported is called so, too.
        owner = None if name in MODULES[1:] else self.names.get(name)
        return _Value(owner) if owner else None

    def call(self, node: ast.Call) -> _Value | None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            called, guarded = self.asking(node, node.func.id)
            return _Value(PLAIN) if guarded and node.func.id == "hasattr" else called
        called = self.of(node.func)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(argument)
        if called is None:  # a class of somebody else, or a function, which may give anything
            name = (
                node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            )
            return _FOREIGN if name.lstrip("_")[:1].isupper() else None
        return _Value(called.owner) if called.is_class else called

    def asking(self, node: ast.Call, function: str) -> tuple[_Value | None, bool]:
        """``getattr(x, "NAME", default)`` and ``hasattr(x, "NAME")``."""
        base = self.of(node.args[0])
        for argument in node.args[1:]:
            self.visit(argument)
        guarded = function == "hasattr" or len(node.args) == 3
        if base is None or base == _FOREIGN:
            return base, guarded
        name = _text(node.args[1])
        if name is None:
            self.problem(node, f"{ast.unparse(node)}: write the name out")
            return _FOREIGN, guarded
        return self.member(base, name, node, guarded), guarded

    def member(self, base: _Value, name: str, node: ast.expr, guarded: bool) -> _Value:
        owner = base.owner if base.is_class else self.given(base)
        if owner in (PLAIN, _FOREIGN.owner):
            return base
        if not owner:
            self.problem(
                node,
                f"it is not known what {base.owner}.{base.name} gives, whose {name} is touched: "
                "add it to tests/tensorrt_objects.py",
            )
            return _FOREIGN
        if name.startswith("__"):  # every class and module of Python has those
            return _Value(PLAIN)
        self.uses[Use(owner, name, node.lineno, guarded or (owner, name) in self.guards)] = None
        if owner == MODULE and name[:1].isupper():
            return _Value(name, is_class=True)
        if base.is_class:
            return _Value(owner)  # a value of an enumeration, or one inside that shares its names
        return _Value(owner, name)

    def given(self, value: _Value) -> str:
        """The class of a value; "" when nobody knows."""
        return GIVES.get((value.owner, value.name), "") if value.name else value.owner

    def problem(self, node: ast.expr, text: str) -> None:
        self.problems[f"line {node.lineno}: {text}"] = None


def _text(node: ast.expr) -> str | None:
    """A name that is written out, with ``*`` for what is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [str(v.value) if isinstance(v, ast.Constant) else "*" for v in node.values]
        return "".join(parts) if parts.count("*") == 1 else None
    return None
