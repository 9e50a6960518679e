//! What vLLM learns of a chat template from its syntax tree, and what we have to know of it.
//!
//! vLLM 0.32.0 (`renderers/hf.py`, `_detect_content_format`) gives a template lists of parts if it loops over a
//! message's content, and strings otherwise. The rules are followed as they are, oddities included: they look at names,
//! not at scopes.

use std::collections::BTreeSet;

use minijinja::machinery::ast::{CallArg, Expr, ForLoop, Macro, Set, Stmt};

use super::messages::ContentFormat;

/// Methods of a Python `dict`. `x.items` without a call is the method in Jinja2 and the key in minijinja.
const DICT_METHODS: [&str; 11] =
    ["clear", "copy", "fromkeys", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"];

/// A template's nodes by kind, in the order of the source.
#[derive(Default)]
pub(super) struct Nodes<'t> {
    sets: Vec<&'t Set<'t>>,
    /// With the macro that the loop stands in, if any (its place in `macros`).
    loops: Vec<(&'t ForLoop<'t>, Option<usize>)>,
    macros: Vec<&'t Macro<'t>>,
    calls: Vec<(&'t Expr<'t>, &'t [CallArg<'t>])>,
    /// Attributes that are read and not called.
    attributes: BTreeSet<&'t str>,
    /// Every expression, but for the names of called methods.
    exprs: Vec<&'t Expr<'t>>,
    /// Whether `autoescape` is switched.
    escapes: bool,
}

impl<'t> Nodes<'t> {
    /// Walks over the whole tree.
    pub(super) fn of(template: &'t Stmt<'t>) -> Self {
        let mut nodes = Self::default();
        nodes.stmt(template, None);
        nodes
    }

    /// Whether a method of `dict` is read as if it were a key.
    pub(super) fn reads_a_method(&self) -> bool {
        DICT_METHODS.iter().any(|method| self.attributes.contains(method))
    }

    /// Every expression, but for the names of called methods.
    pub(super) fn all_exprs(&self) -> &[&'t Expr<'t>] {
        &self.exprs
    }

    /// What is called.
    pub(super) fn callees(&self) -> impl Iterator<Item = &'t Expr<'t>> {
        self.calls.iter().map(|(callee, _)| *callee)
    }

    /// Whether the template declares this macro.
    pub(super) fn has_macro(&self, name: &str) -> bool {
        self.macros.iter().any(|declared| declared.name == name)
    }

    /// Whether escaping is switched on or off.
    pub(super) fn escapes(&self) -> bool {
        self.escapes
    }

    /// How content reaches the template.
    pub(super) fn content_format(&self) -> ContentFormat {
        // An assertion of the engine fails where something else than a name is set or looped over; it then takes
        // strings.
        if self.loops_over_content().unwrap_or(false) { ContentFormat::OpenAi } else { ContentFormat::String }
    }

    fn loops_over_content(&self) -> Option<bool> {
        let messages = self.messages_items()?;
        for (at, (looped, inside)) in self.loops.iter().enumerate() {
            let is_content = messages.iter().any(|name| reaches(&looped.iter, name, Some("content")));
            let is_passed = inside.is_some_and(|_| self.loops_over_passed_content(at, &messages));
            let is_named = inside.is_none() && name(&looped.iter) == Some("content");
            if is_content || is_passed || is_named {
                return name(&looped.target).map(|_| true);
            }
        }
        Some(false)
    }

    /// The names that stand for `messages`, by assignment.
    fn messages_names(&self) -> Option<Vec<&'t str>> {
        let mut names = vec!["messages"];
        let mut done = 0;
        while let Some(known) = names.get(done).copied() {
            done += 1;
            for set in self.sets.iter().filter(|set| reaches(&set.expr, known, None)) {
                let assigned = name(&set.target)?;
                if !names.contains(&assigned) {
                    names.push(assigned);
                }
            }
        }
        Some(names)
    }

    /// The names that stand for one message, by loops.
    fn messages_items(&self) -> Option<Vec<&'t str>> {
        let messages = self.messages_names()?;
        let over = |looped: &ForLoop<'t>| messages.iter().any(|name| reaches(&looped.iter, name, None));
        self.loops.iter().filter(|(looped, _)| over(looped)).map(|(looped, _)| name(&looped.target)).collect()
    }

    /// Whether a loop in a macro goes over a parameter that is given a message's content somewhere.
    fn loops_over_passed_content(&self, at: usize, messages: &[&str]) -> bool {
        let (looped, Some(inside)) = self.loops[at] else { return false };
        let Some(parameter) = name(&looped.iter) else { return false };
        let declared = self.macros[inside];
        let is_content = |expr: &Expr<'_>| messages.iter().any(|name| reaches(expr, name, Some("content")));
        let parameter_at = |place: usize| declared.args.get(place).and_then(name);
        let calls = self.calls.iter().filter(|(callee, _)| name(callee) == Some(declared.name));
        calls.into_iter().any(|(_, args)| {
            let positional = args.iter().filter_map(|arg| if let CallArg::Pos(expr) = arg { Some(expr) } else { None });
            let by_place =
                positional.enumerate().any(|(place, expr)| parameter_at(place) == Some(parameter) && is_content(expr));
            let is_declared = declared.args.iter().any(|arg| name(arg) == Some(parameter));
            let by_name = args.iter().any(|arg| {
                matches!(arg, CallArg::Kwarg(given, expr) if *given == parameter && is_declared && is_content(expr))
            });
            by_place || by_name
        })
    }

    fn stmts(&mut self, stmts: &'t [Stmt<'t>], inside: Option<usize>) {
        for stmt in stmts {
            self.stmt(stmt, inside);
        }
    }

    fn stmt(&mut self, stmt: &'t Stmt<'t>, inside: Option<usize>) {
        match stmt {
            Stmt::Template(node) => self.stmts(&node.children, inside),
            Stmt::EmitExpr(node) => self.expr(&node.expr),
            Stmt::ForLoop(node) => {
                self.loops.push((node, inside));
                self.exprs([&node.target, &node.iter].into_iter().chain(&node.filter_expr));
                self.stmts(&node.body, inside);
                self.stmts(&node.else_body, inside);
            }
            Stmt::IfCond(node) => {
                self.expr(&node.expr);
                self.stmts(&node.true_body, inside);
                self.stmts(&node.false_body, inside);
            }
            Stmt::WithBlock(node) => {
                self.exprs(node.assignments.iter().flat_map(|(target, expr)| [target, expr]));
                self.stmts(&node.body, inside);
            }
            Stmt::Set(node) => {
                self.sets.push(node);
                self.exprs([&node.target, &node.expr]);
            }
            Stmt::SetBlock(node) => {
                self.exprs([&node.target].into_iter().chain(&node.filter));
                self.stmts(&node.body, inside);
            }
            Stmt::AutoEscape(node) => {
                self.escapes = true;
                self.stmts(&node.body, inside);
            }
            Stmt::FilterBlock(node) => {
                self.expr(&node.filter);
                self.stmts(&node.body, inside);
            }
            Stmt::Block(node) => self.stmts(&node.body, inside),
            Stmt::Macro(node) => {
                self.macros.push(node);
                let this = self.macros.len() - 1;
                self.exprs(node.args.iter().chain(&node.defaults));
                self.stmts(&node.body, Some(this));
            }
            Stmt::CallBlock(node) => {
                self.call(&node.call.expr, &node.call.args);
                self.exprs(node.macro_decl.args.iter().chain(&node.macro_decl.defaults));
                self.stmts(&node.macro_decl.body, inside);
            }
            Stmt::Do(node) => self.call(&node.call.expr, &node.call.args),
            // Templates of one file have no others to take from; the rest has no expressions.
            Stmt::Import(_) | Stmt::FromImport(_) | Stmt::Extends(_) | Stmt::Include(_) => {}
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => {}
        }
    }

    fn exprs(&mut self, exprs: impl IntoIterator<Item = &'t Expr<'t>>) {
        for expr in exprs {
            self.expr(expr);
        }
    }

    fn call(&mut self, callee: &'t Expr<'t>, args: &'t [CallArg<'t>]) {
        self.calls.push((callee, args));
        match callee {
            Expr::GetAttr(node) => self.expr(&node.expr),
            other => self.expr(other),
        }
        self.args(args);
    }

    fn args(&mut self, args: &'t [CallArg<'t>]) {
        for arg in args {
            match arg {
                CallArg::Pos(expr) | CallArg::Kwarg(_, expr) | CallArg::PosSplat(expr) | CallArg::KwargSplat(expr) => {
                    self.expr(expr);
                }
            }
        }
    }

    fn expr(&mut self, expr: &'t Expr<'t>) {
        self.exprs.push(expr);
        match expr {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::Slice(node) => {
                self.exprs([&node.expr].into_iter().chain(&node.start).chain(&node.stop).chain(&node.step));
            }
            Expr::UnaryOp(node) => self.expr(&node.expr),
            Expr::BinOp(node) => self.exprs([&node.left, &node.right]),
            Expr::Compare(node) => self.exprs([&node.expr].into_iter().chain(node.ops.iter().map(|op| &op.expr))),
            Expr::IfExpr(node) => {
                self.exprs([&node.test_expr, &node.true_expr].into_iter().chain(&node.false_expr));
            }
            Expr::Filter(node) => {
                self.exprs(&node.expr);
                self.args(&node.args);
            }
            Expr::Test(node) => {
                self.expr(&node.expr);
                self.args(&node.args);
            }
            Expr::GetAttr(node) => {
                self.attributes.insert(node.name);
                self.expr(&node.expr);
            }
            Expr::GetItem(node) => self.exprs([&node.expr, &node.subscript_expr]),
            Expr::Call(node) => self.call(&node.expr, &node.args),
            Expr::List(node) => self.exprs(&node.items),
            Expr::Tuple(node) => self.exprs(&node.items),
            Expr::Map(node) => self.exprs(node.keys.iter().chain(&node.values)),
        }
    }
}

fn name<'t>(expr: &Expr<'t>) -> Option<&'t str> {
    if let Expr::Var(node) = expr { Some(node.id) } else { None }
}

/// Whether the expression is the variable (or its field `key`), perhaps filtered, tested or sliced
/// (`_is_var_or_elems_access`).
fn reaches(expr: &Expr<'_>, variable: &str, key: Option<&str>) -> bool {
    match expr {
        Expr::Filter(node) => node.expr.as_ref().is_some_and(|inner| reaches(inner, variable, key)),
        Expr::Test(node) => reaches(&node.expr, variable, key),
        Expr::Slice(node) => reaches(&node.expr, variable, key),
        Expr::GetItem(node) => {
            let subscript = if let Expr::Const(value) = &node.subscript_expr { value.value.as_str() } else { None };
            key.is_some() && subscript == key && name(&node.expr) == Some(variable)
        }
        Expr::GetAttr(node) => key == Some(node.name) && name(&node.expr) == Some(variable),
        Expr::Var(node) => key.is_none() && node.id == variable,
        _ => false,
    }
}
