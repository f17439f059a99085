"""An environment: a calculator that the policy uses by writing <calc>2*(3+4)</calc>, to be told =14;"""

from __future__ import annotations

import ast
import operator
import re

_CALL = re.compile(r"<calc>([^<>]{1,100})</calc>[^\s<]*\s*$")  # a token may go on after the mark
_OPERATORS = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow},
    **{ast.UAdd: operator.pos, ast.USub: operator.neg},
}
_LARGEST, _LARGEST_EXPONENT = 1e15, 50


def respond(turns: list[str], **columns: object) -> str | None:
    """The value of the expression that the policy's turn ends with; `None`, the end, where there is none."""
    call = _CALL.search(turns[-1])
    return f"={calculate(call[1])};" if call else None


def calculate(expression: str) -> str:
    """Its value to 10 digits, or `error` where it is no arithmetic, has no real value or too large a one."""
    try:
        value = _value(ast.parse(expression.strip().replace(",", ""), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"
    return str(value) if isinstance(value, int) else f"{value:.10g}"


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(int() | float() as number) if not isinstance(number, bool):
            value = number
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            operands = _value(left), _value(right)
            if isinstance(op, ast.Pow) and abs(operands[1]) > _LARGEST_EXPONENT:
                raise ValueError("exponent")
            value = _OPERATORS[type(op)](*operands)
        case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_value(operand))
        case _:
            raise ValueError("no arithmetic")
    if isinstance(value, complex) or not abs(value) <= _LARGEST:
        raise ValueError("no real number, or too large")
    return value
