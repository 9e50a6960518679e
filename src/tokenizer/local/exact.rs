//! Which templates are rendered here at all: those that use nothing but what is known to do what Jinja2 does.
//!
//! Operators cannot be replaced in minijinja, and `~` makes text of any value. So every operand of `~` that is not
//! surely text gets a filter behind it ([`guard`]) which refuses what Python would write in another way; likewise for
//! `+` in templates that mark text as safe. The outcome is parsed again and must have all of its operands guarded.

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, UnaryOpKind};
use minijinja::{Error, ErrorKind};

use super::python::{PLAIN_GUARD, TEXT_GUARD, refused};
use super::syntax::Nodes;

/// Filters that are exact or refuse.
const FILTERS: [&str; 26] = [
    "capitalize",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "safe",
    "select",
    "selectattr",
    "string",
    "tojson",
    "trim",
    "upper",
    PLAIN_GUARD,
    TEXT_GUARD,
];

/// Tests that are exact or refuse.
const TESTS: [&str; 21] = [
    "!=",
    "==",
    "boolean",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "even",
    "false",
    "float",
    "in",
    "integer",
    "iterable",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sequence",
    "string",
    "true",
];

/// Functions, besides the template's own macros.
const FUNCTIONS: [&str; 6] = ["caller", "dict", "namespace", "raise_exception", "range", "strftime_now"];

/// Methods; those of text are exact or refuse, by `python`.
const METHODS: [&str; 28] = [
    "capitalize",
    "count",
    "endswith",
    "find",
    "get",
    "isalnum",
    "isalpha",
    "isascii",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "isupper",
    "items",
    "join",
    "keys",
    "lower",
    "lstrip",
    "replace",
    "rfind",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "title",
    "upper",
    "values",
];

/// Filters whose outcome is unmarked text or an integer.
const TEXTUAL: [&str; 10] =
    ["capitalize", "count", "join", "length", "lower", "replace", "tojson", "trim", "upper", TEXT_GUARD];

/// What the template uses that is not known to be exact, if anything.
///
/// # Errors
/// Its name.
pub(super) fn check(nodes: &Nodes<'_>) -> Result<(), Error> {
    let unknown = |kind: &str, name: &str| {
        let error = match kind {
            "filter" => ErrorKind::UnknownFilter,
            "test" => ErrorKind::UnknownTest,
            "function" => ErrorKind::UnknownFunction,
            "method" => ErrorKind::UnknownMethod,
            _ => ErrorKind::InvalidOperation,
        };
        Error::new(error, format!("the {kind} {name} is not known to do what Jinja2's does"))
    };
    if nodes.escapes() {
        return Err(unknown("statement", "autoescape"));
    }
    for expr in nodes.all_exprs() {
        match expr {
            Expr::Filter(node) if !FILTERS.contains(&node.name) => return Err(unknown("filter", node.name)),
            Expr::Filter(node) if has_strange_name(node.name, &node.args) => {
                return Err(unknown("argument of the filter", node.name));
            }
            Expr::Test(node) if !TESTS.contains(&node.name) => return Err(unknown("test", node.name)),
            Expr::BinOp(node) if matches!(node.op, BinOpKind::Div) => return Err(unknown("operator", "/")),
            Expr::BinOp(node) if matches!(node.op, BinOpKind::Pow) => return Err(unknown("operator", "**")),
            _ => {}
        }
    }
    for callee in nodes.callees() {
        match callee {
            Expr::Var(node) if FUNCTIONS.contains(&node.id) || nodes.has_macro(node.id) => {}
            Expr::Var(node) => return Err(unknown("function", node.id)),
            Expr::GetAttr(node) if METHODS.contains(&node.name) => {}
            Expr::GetAttr(node) => return Err(unknown("method", node.name)),
            other => return Err(unknown("call of a", other.description())),
        }
    }
    Ok(())
}

/// Whether the filter applies a filter or test that is not known by its name, or takes it from a value.
fn has_strange_name(filter: &str, args: &[CallArg<'_>]) -> bool {
    let (at, known): (usize, &[&str]) = match filter {
        "map" => (0, &FILTERS),
        "select" | "reject" => (0, &TESTS),
        "selectattr" | "rejectattr" => (1, &TESTS),
        _ => return args.iter().any(|arg| matches!(arg, CallArg::PosSplat(_) | CallArg::KwargSplat(_))),
    };
    args.get(at).is_some_and(|arg| match arg {
        CallArg::Pos(Expr::Const(name)) => !name.value.as_str().is_some_and(|name| known.contains(&name)),
        CallArg::Kwarg("attribute", _) => filter != "map",
        _ => true,
    })
}

/// The source with a filter behind each operand of `~` (and of `+`, where text is marked as safe) that may be anything,
/// and how many filters these are.
///
/// # Errors
/// An operand that can have no filter.
pub(super) fn guard(source: &str, nodes: &Nodes<'_>) -> Result<(String, usize), Error> {
    let mut places = places(nodes)?;
    places.sort_unstable();
    places.dedup();
    let mut guarded = String::with_capacity(source.len() + 32 * places.len());
    let mut copied = 0;
    for (end, filter) in &places {
        let piece = source.get(copied..*end).ok_or_else(|| refused("an operand is not where it was read"))?;
        guarded.push_str(piece);
        guarded.push('|');
        guarded.push_str(filter);
        copied = *end;
    }
    guarded.push_str(&source[copied..]);
    Ok((guarded, places.len()))
}

/// Whether a guarded source, parsed again, has a guard behind all operands, and `n_guards` of them.
pub(super) fn is_guarded(nodes: &Nodes<'_>, n_guards: usize) -> bool {
    let is_guard =
        |expr: &&&Expr<'_>| matches!(expr, Expr::Filter(node) if [TEXT_GUARD, PLAIN_GUARD].contains(&node.name));
    places(nodes).is_ok_and(|places| places.is_empty()) && nodes.all_exprs().iter().filter(is_guard).count() == n_guards
}

/// Where the operands end that need a guard, with its name.
fn places(nodes: &Nodes<'_>) -> Result<Vec<(usize, &'static str)>, Error> {
    let marks = nodes.all_exprs().iter().any(|expr| matches!(expr, Expr::Filter(node) if node.name == "safe"));
    let mut places = Vec::new();
    for expr in nodes.all_exprs() {
        let Expr::BinOp(node) = expr else { continue };
        let guard = match node.op {
            BinOpKind::Concat => TEXT_GUARD,
            BinOpKind::Add if marks => PLAIN_GUARD,
            _ => continue,
        };
        operand(&node.left, guard, &mut places)?;
        operand(&node.right, guard, &mut places)?;
    }
    Ok(places)
}

/// Adds the places that make an operand safe to use.
fn operand(expr: &Expr<'_>, guard: &'static str, places: &mut Vec<(usize, &'static str)>) -> Result<(), Error> {
    match expr {
        Expr::Const(node) if node.value.as_str().is_some() || node.value.is_integer() => {}
        Expr::Test(_) | Expr::Compare(_) => {}
        Expr::UnaryOp(node) => match node.op {
            UnaryOpKind::Not => {}
            UnaryOpKind::Neg => operand(&node.expr, guard, places)?,
        },
        Expr::BinOp(node) => match node.op {
            BinOpKind::Concat => {}
            BinOpKind::Add
            | BinOpKind::Sub
            | BinOpKind::Mul
            | BinOpKind::Div
            | BinOpKind::FloorDiv
            | BinOpKind::Rem
            | BinOpKind::Pow
            | BinOpKind::ScAnd
            | BinOpKind::ScOr => {
                operand(&node.left, guard, places)?;
                operand(&node.right, guard, places)?;
            }
            _ => {}
        },
        Expr::IfExpr(node) => {
            operand(&node.true_expr, guard, places)?;
            if let Some(other) = &node.false_expr {
                operand(other, guard, places)?;
            }
        }
        Expr::Filter(node) if node.name == guard || TEXTUAL.contains(&node.name) => {}
        Expr::Filter(_)
        | Expr::Const(_)
        | Expr::Var(_)
        | Expr::GetAttr(_)
        | Expr::GetItem(_)
        | Expr::Slice(_)
        | Expr::Call(_) => {
            places.push((expr.span().end_offset as usize, guard));
        }
        // Lists are added to lists; no text is made of them.
        Expr::List(_) | Expr::Tuple(_) if guard == PLAIN_GUARD => {}
        Expr::List(_) | Expr::Tuple(_) | Expr::Map(_) => return Err(refused("a list or an object is made text")),
    }
    Ok(())
}
