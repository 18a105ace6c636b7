"""The pages of the library, read from its source without importing it: signatures, and what the comments say of each parameter."""
import ast
import io
import re
import tokenize


def comments_of(source):
    "Line -> comment."
    return {t.start[0]: t.string[1:].strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}


def escaped(text):
    "A docstring or comment as reStructuredText: code between back ticks and equations stay, nothing else is special."
    parts = re.split(r'(`[^`]+`|\$[^$\s][^$]*\$)', text)
    kept = lambda p: f'``{p[1:-1].strip()}``' if p[0] == '`' else f':math:`{p[1:-1]}`'
    return ''.join(kept(p) if i % 2 else re.sub(r'([\\*_|`])', r'\\\1', p) for i, p in enumerate(parts)).replace('\n', ' ')


def parameters_of(node):
    "(name, line) of every parameter, `self` left out."
    a = node.args
    every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    return [(x.arg, x.lineno) for x in every if x.arg not in ('self', 'cls')]


def said(named, comments):
    "A line for each comment; parameters that share a line share it."
    shared = {}
    for name, line in named: shared.setdefault(line, []).append(name)
    names = lambda who: ', '.join(f'``{w}``' for w in who if w != 'returns') or '**returns**'
    return [f'* {names(who)}: {escaped(comments[line])}' for line, who in shared.items() if comments.get(line)]


def call_of(node, drop_self=False):
    "The signature as written, on one line."
    args = ast.unparse(node.args)
    if drop_self: args = re.sub(r'^(self|cls)(, )?', '', args)
    return f'({args})' + (f' -> {ast.unparse(node.returns)}' if node.returns else '')


def entry(kind, name, call, node, lines, inner=(), options=()):
    "One directive with what belongs to it."
    doc = ast.get_docstring(node)
    body = [*([escaped(doc)] if doc else []), '', *lines, '', *inner]
    return [f'.. py:{kind}:: {name}{call}', *(f'   :{o}:' for o in options), '', *(f'   {line}' if line else '' for line in body), '']


def function(node, comments, kind='function', options=()):
    "A function or a method."
    returns = [('returns', node.returns.lineno)] if node.returns else []
    return entry(kind, node.name, call_of(node, kind == 'method'), node, said(parameters_of(node) + returns, comments), options=options)


def method(node, comments):
    "A method, or a property."
    marks = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
    if 'property' in marks: return entry('property', node.name, f'\n      :type: {ast.unparse(node.returns)}' if node.returns else '', node, [])
    return function(node, comments, 'method', [m for m in ('classmethod', 'staticmethod') if m in marks])


def klass(node, comments):
    "A class with what its users call."
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    made_by = next((n for n in methods if n.name == '__init__'), None)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)] if not made_by else []
    call = call_of(made_by, True) if made_by else '(' + ', '.join(ast.unparse(f) for f in fields) + ')' if fields else ''
    lines = said(parameters_of(made_by) if made_by else [(f.target.id, f.lineno) for f in fields], comments)
    bases = [ast.unparse(b) for b in node.bases]
    if bases: lines = [f'Derives from: {", ".join(f"``{b}``" for b in bases)}', '', *lines]
    public = [n for n in methods if n.name[0] != '_' or n.name == '__call__']
    return entry('class', node.name, call, node, lines, [line for n in public for line in method(n, comments)])


def constant(node, comments):
    "A table or number that the module keeps."
    value = ast.unparse(node.value)
    return [f'.. py:data:: {node.targets[0].id}', *([f'   :value: {value}'] if len(value) <= 100 else []), '', f'   {escaped(comments.get(node.lineno, ""))}', '']


def module_page(source, name, made_in):
    "reStructuredText of one module; `made_in`: a sentence that leads to its chapter."
    tree, comments = ast.parse(source), comments_of(source)
    public = ast.literal_eval(next(n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__'))
    lines = [name, '='*len(name), '', escaped(ast.get_docstring(tree) or ''), '', made_in, '', f'.. py:module:: {name}', '']
    for n in tree.body:
        if isinstance(n, ast.FunctionDef) and n.name in public: lines += function(n, comments)
        if isinstance(n, ast.ClassDef) and n.name in public: lines += klass(n, comments)
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and n.targets[0].id in public:
            lines += constant(n, comments); public.remove(n.targets[0].id)     # a second assignment is no second entry
    return '\n'.join(lines)
