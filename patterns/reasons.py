"""Reasons: why a mixer that was seen stays as it is, all of them, each with a stable code.

Code that declines takes a constant from here and fills in its fields:
`Rejection(reasons.NOT_CAUSAL(output=3, input=5))`.
`python docs/make_reasons.py` writes docs/reasons.md from this table. Codes are public: a code keeps its meaning, and a
reason that is no longer given leaves its code unused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from string import Formatter


@dataclass(frozen=True)
class GivenReason:
    """A reason, given for one mixer.

    Args:
        code: that of the reason.
        text: its sentence with the fields filled in.
        hint: what to do.
    """

    code: str
    text: str
    hint: str


@dataclass(frozen=True)
class Reason:
    """One entry of the table.

    Args:
        code: a stable word, in kebab case.
        sentence: what is said; `{fields}` are filled in where the reason is given, and may have a format.
        hint: what to do.
        meaning: what is behind it, for docs/reasons.md.
    """

    code: str
    sentence: str
    hint: str
    meaning: str = ""

    @cached_property
    def fields(self) -> frozenset[str]:
        """The names of the fields in the sentence."""
        return frozenset(name for _, name, _, _ in Formatter().parse(self.sentence) if name is not None)

    def __call__(self, **fields: object) -> GivenReason:
        """The reason with its fields filled in.

        Raises:
            KeyError: a field is missing, or is not one of the sentence's.
        """
        if fields.keys() != self.fields:
            raise KeyError(f"reason {self.code!r} has the fields {sorted(self.fields)}, and was given {sorted(fields)}")
        return GivenReason(self.code, self.sentence.format(**fields), self.hint)


@dataclass(frozen=True)
class Group:
    """Reasons that are found in the same way, in the order in which they are checked.

    Args:
        title: a heading.
        about: what they have in common, in a sentence.
    """

    title: str
    about: str
    entries: list[Reason] = field(default_factory=list)

    def add(self, code: str, sentence: str, hint: str, meaning: str = "") -> Reason:
        """Adds an entry to the table.

        Raises:
            ValueError: another entry has the code.
        """
        if any(entry.code == code for group in TABLE for entry in group.entries):
            raise ValueError(f"two reasons have the code {code!r}")
        self.entries.append(Reason(code, sentence, hint, meaning))
        return self.entries[-1]


TABLE: list[Group] = []


def _group(title: str, about: str) -> Group:
    TABLE.append(Group(title, about))
    return TABLE[-1]


_AS_IT_IS = "the code runs as it is"
_WHOLE_PAST = "log-linear attention covers the whole past"
_SCORES = (
    "use scores as they are, without a square, exponential or softmax; apply functions to queries and keys instead"
)
_FAMILIES = "compare the code with the recurrences in docs/operator.md"
_GRADIENTS = "move it out of the mixer, to where its queries, keys, values and gates are computed"
_OUTSIDE = "move it out of the mixer: apply it to queries, keys, values or gates, or to the output"
_LENGTH = "mark_dynamic or export makes the length dynamic; without them Dynamo compiles once per length"
_PLAIN = "write it without the in-place statement (o = o * 2)"
_LIBRARY = "the call runs the library's own code, so the model is unchanged"
_MOVE_BREAK = "use TORCH_LOGS=graph_breaks to find it"
_KEPT = (
    "it runs unchanged and keeps earlier level weights; to try again, call llcompile.revert(model) and convert the "
    "model again"
)
# Instead of a hint, where a declined call breaks the graph.
BREAKS = "the graph breaks there and the library's own code runs, as it does without this backend"

# ---- recognition

_computes = _group(
    "Hand-written mixers: what they compute",
    "The first property of all families that the code does not have, measured on random numbers.",
)
# What sees what.
NOT_CAUSAL = _computes.add(
    "not-causal",
    "not causal: output {output} depends on input {input}",
    "use a causal mask: log-linear attention only looks back",
    "a position sees later ones; bidirectional mixers stay unchanged",
)
BIDIRECTIONAL = _computes.add(
    "bidirectional",
    "bidirectional: output {output} depends on the value of input {input}",
    "nothing: it looks in both directions on purpose, and log-linear attention only looks back",
    "a linear mixer over all tokens, or a pair of mixers, one for each direction; the report has it with the untouched",
)
ROWS_MIXED = _computes.add(
    "rows-mixed",
    "rows are mixed: sequences of a batch, or heads, act on each other",
    "give each sequence and head its own state",
    "states are shared or averaged",
)
# What is summed up.
NOT_LINEAR_IN_VALUE = _computes.add(
    "not-linear-in-value",
    "not linear in the value",
    "the output must be a weighted sum of values: apply nonlinear functions after the mixer",
    "the output is not a sum of values",
)
VALUE_NOT_FOUND = _computes.add(
    "value-not-found",
    "queries and keys were found, but no input that its result is a weighted sum of",
    "compute values apart from queries and keys; apply nonlinear functions after the mixer",
    "the search ended there: nothing is known of a value, and so nothing of how it is weighed",
)
STRICTLY_CAUSAL = _computes.add(
    "strictly-causal",
    "keys and values are those of earlier tokens: a token does not see itself",
    "mix keys and values of earlier tokens with those of the token itself",
    "what computes the keys and values from tokens leaves the token itself out",
)
VALUE_CHANNELS = _computes.add(
    "value-channels",
    "each channel of the value has its own weights: a decay, gate or rate has the value's axis",
    "use one decay per head or per channel of the key",
)
ADDED_TO_SUM = _computes.add(
    "added-to-sum",
    "a term added to its sum is neither an initial state nor the token's own value",
    "add it to the output, after the mixer",
)
STRAY_SOURCE = _computes.add(
    "stray-source",
    "an input acts on single outputs, but neither as a factor nor as a summand",
    "move it after the mixer",
    "something at the output is neither a gate nor a skip",
)
# How it is weighed.
THIRD_POSITION = _computes.add(
    "third-position",
    "the score of two positions depends on a third: the score of token {token} depends on earlier tokens",
    "scores may depend on the two positions and, through decays, on the tokens between them",
    "something between scores and values looks at other tokens",
)
NO_QUERY = _computes.add(
    "no-query",
    "no query: each sequence that is multiplied with another also affects later outputs",
    "a query affects only its own position: compute decays and errors from other inputs",
)
NO_KEY = _computes.add(
    "no-key",
    "no key: the query is not multiplied with any other sequence",
    "a query is multiplied with keys in the state: compute decays and errors from other inputs",
)
NO_VALUE = _computes.add(
    "no-value",
    "no value: a query is multiplied with a sum of keys alone",
    _AS_IT_IS,
    "nothing is divided by such a sum, so that it is no denominator",
)
DECAY_OF_QUERY = _computes.add(
    "decay-of-query",
    "the weights of the past depend on another sequence at the query's position (a decay of the query)",
    "a decay belongs to the positions between key and query, not to the query's own position",
)
SOFTMAX_SCORES = _computes.add(
    "softmax-scores",
    "not linear in the query: scores pass through a softmax",
    "the code runs as it is: softmax attention is not a linear-time mixer",
    "softmax attention that was not identified by name",
)
NOT_LINEAR_IN_QUERY = _computes.add(
    "not-linear-in-query",
    "not linear in the query",
    _SCORES,
    "scores are squared, rectified, exponentiated or normalised",
)
NOT_LINEAR_IN_KEY = _computes.add("not-linear-in-key", "not linear in the key", _SCORES, "the same as for the query")
OTHER_DENOMINATOR = _computes.add(
    "other-denominator",
    "its denominator is not the sum of its scores",
    "divide by the sum of the same scores",
    "the output is divided by another sum over queries, keys or values",
)
COMPARES_VALUES = _computes.add(
    "compares-values",
    "its computation depends on comparisons of values",
    "top-k, thresholds and buckets leave tokens out; log-linear attention covers the whole past",
)
# What becomes of a weight with time.
SLIDING_WINDOW = _computes.add(
    "sliding-window",
    "its reach is limited: output {output} no longer depends on input {input} (a window or a reset)",
    _WHOLE_PAST,
    "old tokens are dropped",
)
SKIPPED_TOKENS = _computes.add(
    "skipped-tokens",
    "it skips earlier tokens: output {output} does not depend on input {input}",
    _WHOLE_PAST,
    "the scores of some pairs are zero",
)
DECAY_NOT_A_PRODUCT = _computes.add(
    "decay-not-a-product",
    "its decay is not a product of one factor per token",
    "use a product of one factor per token (and head, or channel of the key)",
    "a bias by distance, or a power law",
)
SEVERAL_ERASE_KEYS = _computes.add(
    "several-erase-keys",
    "a token erases along more than one key",
    "erase along one key per token; it need not be the one that is written to",
    "two or more directions are taken out of the state, or a matrix of full rank acts on it",
)
# What it is then.
UNKNOWN_SCORES = _computes.add(
    "unknown-scores",
    "its scores are not those of a known family",
    _FAMILIES,
    "queries, keys and values were found, but the operator gives another result on them",
)
UNKNOWN_RESULT = _computes.add(
    "unknown-result",
    "its result is that of no known family, with or without a denominator",
    _FAMILIES,
    "the same, where the result does not grow with the query",
)
NEAR_A_FAMILY = _computes.add(
    "near-a-family",
    "agrees only to {error:.0e} at w = 1",
    _FAMILIES,
    "this is the error of the nearest family, and it is too large",
)
PROOF_FAILED = _computes.add(
    "proof-failed",
    "agrees only to {error:.0e} at w = 1 (at length {length})",
    "look for code that depends on the length; see docs/recognition.md for the proof",
    "a hypothesis was found but failed its proof at that length",
)
GRADIENTS_DIFFER = _computes.add(
    "gradients-differ",
    "its gradients differ from the operator's by {error:.0e}",
    "the code runs as it is; move whatever stops or changes a gradient out of the mixer",
)

_inside = _group(
    "Hand-written mixers: code inside",
    "The code would be a mixer, except for something inside it: a change of gradient or dtype, an operation that no "
    "proof covers, a dependence on the length, or an in-place statement. See "
    "[recognition.md](recognition.md#in-place-statements).",
)
NO_GRAD = _inside.add(
    "no-grad",
    "it runs under torch.no_grad(), where level weights cannot learn",
    _AS_IT_IS,
    "all of it is in a region without gradients",
)
NO_GRAD_INSIDE = _inside.add(
    "no-grad-inside", "a part of it runs under torch.no_grad(){at}", "run all of it in one mode"
)
AUTOCAST_INSIDE = _inside.add(
    "autocast-inside",
    "autocast changes inside{at}",
    "run all of it in one autocast region",
    "one part of it runs in 16 bits and another does not",
)
GRADIENT_STOPPED = _inside.add("gradient-stopped", "its gradient is stopped inside (detach){at}", _GRADIENTS)
FUNCTION_INSIDE = _inside.add("function-inside", "a function inside has a custom backward{at}", _GRADIENTS)
UNKNOWN_BACKWARD = _inside.add(
    "unknown-backward",
    "the backward of {operation} is unknown{at}",
    _GRADIENTS,
    "it contains a custom operation of torch.library",
)
OWN_BACKWARD = _inside.add(
    "own-backward",
    "it is in an autograd.Function whose backward is not the gradient of its forward",
    "call the mixer outside the Function, so that its level weights have a gradient",
)
RANDOM = _inside.add("random", "its {operation} ({where}) is random", _OUTSIDE, "dropout on the scores")
ROUNDING = _inside.add("rounding", "its {operation} ({where}) rounds to {dtype}", _OUTSIDE)
UNKNOWN_OPERATION = _inside.add(
    "unknown-operation",
    "its {operation} ({where}) is not an operation that a proof by random numbers can cover",
    _OUTSIDE,
    "an operation that is not in the table (grammar.py)",
)
ACTS_INSIDE = _inside.add(
    "acts-inside",
    "its {operation} ({where}) changes values that can occur",
    _OUTSIDE,
    "a clamp, threshold or rectifier inside of the mixer",
)
NOT_SHOWN_IDLE = _inside.add(
    "not-shown-idle",
    "its {operation} ({where}) could not be shown to do nothing",
    _OUTSIDE,
    "a clamp, threshold or rectifier inside of the mixer",
)
DECAY_OUT_OF_RANGE = _inside.add(
    "decay-out-of-range",
    "its decay has values from {low:.3g} to {high:.3g}, and nothing in the code bounds it",
    "keep it in (0, 1], for example with a sigmoid",
    "a plain parameter or an argument with values outside (0, 1]",
)
SHORT_EXAMPLE = _inside.add(
    "short-example",
    "its {operation} of positions ({where}) has no effect at length {length}",
    "use an example that is longer than every window, block and bucket in the code",
    "it would have an effect at later positions",
)
OTHER_LENGTHS = _inside.add("other-lengths", "its {operation} ({where}) may differ at other lengths", _LENGTH)
ONE_LENGTH = _inside.add(
    "one-length",
    "it is a mixer at length {length}, not at {other}",
    _LENGTH,
    "the length must vary, but the code is a mixer at one length only",
)
CLOSED_BODY = _inside.add(
    "closed-body",
    "it is in the body of {operation}, which takes no further operands",
    "move the mixer out of the control flow, or compile the body separately",
)
OPERAND_CHANGED = _inside.add(
    "operand-changed", "an operand is changed in place while it is read", "write the changed operand to a new tensor"
)
OPERAND_LOST = _inside.add(
    "operand-lost",
    "no node before its end returns one of its operands",
    "assign the operand to a variable before it is used",
)
OUTPUT_OUTLIVES = _inside.add(
    "output-outlives",
    "its output is written into a tensor that outlives the call (an input, a buffer)",
    "compute the output in a new tensor, and copy it",
)
COMPUTED_TWICE = _inside.add(
    "computed-twice", "it is computed twice, and one copy is changed in place at {where}", _PLAIN
)
OUTPUT_CHANGED = _inside.add(
    "output-changed",
    "its output is changed in place at {where}, and read through a view made before it",
    _PLAIN,
)

_ends = _group(
    "Hand-written mixers: where the search ends",
    "Queries and keys are multiplied here, but the rest could not be analysed.",
)
TOO_MANY_OPERANDS = _ends.add(
    "too-many-operands",
    "it is computed from {count} tensors, but the search stops at {most} operands",
    "before the loop, compute for all tokens at once what the steps of the loop read",
    "each step of a loop reads its own tensor",
)
PIECE_OF_SEQUENCE = _ends.add(
    "piece-of-sequence",
    "it mixes only a piece of its sequence ({tokens} tokens)",
    "log-linear attention counts positions from the start: mix the whole sequence, or compile the piece separately",
    "a chunk is mixed, but not with other chunks",
)
UNKNOWN_ON_SCORES = _ends.add(
    "unknown-on-scores",
    "scores pass through {operation}, which is unknown",
    "write it with torch operations",
    "there is a custom operation between the scores and the values",
)
NO_VALUES = _ends.add(
    "no-values",
    "it reads a buffer {shape} on the device meta, whose values decide what it computes",
    "load the model on the CPU (--device cpu) to see",
    "a mask or a table of decays; with random numbers in its place the code was no mixer",
)
ANALYSIS_FAILED = _ends.add(
    "analysis-failed",
    "llcompile failed to analyse it: {error}",
    "the code runs unchanged; please report it with the log of TORCH_LOGS=+loglinear",
    "an internal error of llcompile",
)

_unlike = _group(
    "Not similar to a mixer",
    "This applies to most values of a model. They are not in the report, unless the code is otherwise close to a "
    "mixer; `TORCH_LOGS=+loglinear` shows them, one line per subgraph that was tried.",
)
FEW_SEQUENCES = _unlike.add("few-sequences", "it has fewer than two sequences to mix", _AS_IT_IS)
NOT_CONTRACTED = _unlike.add("not-contracted", "no query and key: nothing is contracted", _AS_IT_IS)
NOT_ALL_OF_TIME = _unlike.add("not-all-of-time", "it does not cover the whole time axis", _AS_IT_IS)
RESIDUAL = _unlike.add(
    "residual",
    "it adds a mixer's output to that mixer's input; each mixer is analysed separately",
    _AS_IT_IS,
)
TWO_QUERIES = _unlike.add("two-queries", "two inputs act as queries", _AS_IT_IS)
NOT_LINEAR = _unlike.add("not-linear", "not linear in the query, nor in a value", _AS_IT_IS)
IDLE_SOURCE = _unlike.add("idle-source", "its result does not depend on one of its inputs", _AS_IT_IS)
NOT_FINITE = _unlike.add("not-finite", "its result on random numbers is not finite", _AS_IT_IS)
WHOLE_NUMBERS = _unlike.add("whole-numbers", "it depends on integers or masks of the input", _AS_IT_IS)
TOO_LARGE = _unlike.add(
    "too-large", "it is computed from too many tensors or by too many operations to analyse", _AS_IT_IS
)
NOT_RUN = _unlike.add("not-run", "nothing was measured: it does not run on random numbers by itself", _AS_IT_IS)
UNKNOWN_AXES = _unlike.add("unknown-axes", "its axes are not those of a known family's operands", _AS_IT_IS)
OPERAND_TOO_LARGE = _unlike.add(
    "operand-too-large", "an operand that mixes positions is too large to analyse", _AS_IT_IS
)
WEIGHTS_TOO_LARGE = _unlike.add(
    "weights-too-large",
    "it reads {count:,} numbers of the model's own, more than the {most:,} that are drawn for a proof",
    _AS_IT_IS,
    "all experts of a layer, for example",
)
OPERAND_NOT_RUN = _unlike.add(
    "operand-not-run", "nothing was measured of an operand that mixes positions: it does not run by itself", _AS_IT_IS
)

# ---- known functions

_known = _group(
    "Known functions",
    "The call of a library function is not covered by its entry in the table of known functions, or its proof failed.",
)
SIGNATURE = _known.add(
    "signature",
    "{function} of the installed {library} {problem}",
    "the installed version is not in the table; please report it",
)
ARGUMENT_REFUSED = _known.add("argument-refused", "argument {argument} of {function} {problem}", _LIBRARY)
ARGUMENT_UNKNOWN = _known.add(
    "argument-unknown", "argument {argument} of {function} is set, but is not in the table", _LIBRARY
)
ARGUMENT_SHAPE = _known.add(
    "argument-shape", "argument {argument} of {function} has shape {shape}, expected {expected} ({axes})", _LIBRARY
)
ARGUMENT_VARIES = _known.add(
    "argument-varies",
    "argument {argument} of {function} has shape {shape} and varies along {axis}, but the family has one value per "
    "head",
    _LIBRARY,
)
CALL_NOT_COVERED = _known.add(
    "call-not-covered",
    "the call of {function} {problem}",
    _LIBRARY,
    "a combination of arguments that the entry does not cover",
)
OPERANDS_UNFIT = _known.add("operands-unfit", "its operands do not fit a mixer: {problem}", _LIBRARY)
NOT_PROVABLE_HERE = _known.add(
    "not-provable-here",
    "it cannot be proved on this machine: {problem}",
    _LIBRARY,
    "neither the function nor a reference of its library runs here",
)
IDLE_OPERAND = _known.add(
    "idle-operand", "its result does not depend on {operand}, so agreement proves nothing", _LIBRARY
)
FUNCTION_DIFFERS = _known.add(
    "function-differs",
    "agrees{against} only to {error:.0e} at w = 1, but the bound is {bound:.0e}",
    _LIBRARY,
    "the installed function differs from its entry",
)

# ---- states

_states = _group("States and single tokens", "The mixer was found, but a state or a single token prevents the rewrite.")
LINEAR_STATE = _states.add(
    "linear-state",
    "it received a state without levels: level weights cannot act on the past inside it",
    "run the whole sequence in one call, without a state, or use level_weights='none'",
)
STATE_WITHOUT_PLACE = _states.add(
    "state-without-place",
    "its state has no levels and is computed by the model, so levels cannot be kept",
    "prefill through the compiled model, without a state",
)
ONE_TOKEN_NOT_LINEAR = _states.add(
    "one-token-not-linear",
    "its output for one token is not linear in its values: it received a state, or something else is added to it",
    "call it with two tokens or more",
)
ONE_TOKEN_CHANGED = _states.add(
    "one-token-changed",
    "its output for one token is changed in place, or written into another tensor",
    "call it with two tokens or more",
)

# ---- level weights

_weights = _group("Level weights", "The mixer was found, but its level weights cannot be attached or read.")
NO_OWNER = _weights.add(
    "no-owner",
    "its module cannot be reached from the compiled frame, so it cannot own level weights",
    f"a graph break above this line splits the module's forward; {_MOVE_BREAK}",
)
CUT_OFF_INPUT = _weights.add(
    "cut-off-input",
    "a graph break separates its projections from its mixing, and the input of its level weights is not in this graph",
    f"move the cause of the graph break (a hook, .item(), a print) out of the module; {_MOVE_BREAK}",
)
OTHER_INPUT = _weights.add(
    "other-input",
    "its level weights were made for another input than the one its operands are projected from in this graph",
    "run the same code as in convert, or call llcompile.revert(model) and convert again",
)
AMBIGUOUS_WEIGHTS = _weights.add(
    "ambiguous-weights",
    "its module has several level weights, and it is not clear which ones belong to it",
    f"there is a graph break inside the mixer; {_MOVE_BREAK}",
)
AMBIGUOUS_CHECKPOINT = _weights.add(
    "ambiguous-checkpoint",
    "its module has several level weights from a checkpoint, and it is not clear which ones belong to it",
    "the checkpoint has level weights for more mixers than run here; convert the model again",
)
WEIGHTS_ON_META = _weights.add(
    "weights-on-meta",
    "its level weights are on the device meta: the model's offloading does not load them",
    "exclude the modules named loglinear from offloading",
)
WEIGHTS_OUT_OF_REACH = _weights.add(
    "weights-out-of-reach",
    "its level weights cannot be read from this frame: {error}",
    "compile the model as a whole",
)
NOT_EXPORTED = _weights.add(
    "not-exported",
    "it has no level weights, and an export does not add any",
    "call llcompile.convert(model, *example_inputs) with inputs like those of the export",
)

# ---- the conversion's check

_check = _group(
    "The check of a conversion",
    "`convert` ran the converted model on the example inputs and compared it with the original model.",
)
OUTPUT_CHANGES = _check.add(
    "output-changes",
    "the model's output would change by {error:.1e} of its largest value at level weights of 1 in {dtype} on the "
    "example inputs",
    _KEPT,
)
GRADIENTS_CHANGE = _check.add(
    "gradients-change",
    "the gradients of its parameters would change by {error:.1e} at level weights of 1 in {dtype} on the example "
    "inputs",
    _KEPT,
)
REWRITE_NOT_RUN = _check.add(
    "rewrite-not-run",
    "the rewritten program does not run on the example inputs: it stops at {where}",
    f"{_KEPT}; TORCH_LOGS=loglinear shows the error",
)
WEIGHTS_IDLE = _check.add(
    "weights-idle",
    "noise on its level weights does not change what the model returns: either no output depends on the mixer, "
    "or the compiled program does not read its level weights",
    _KEPT,
)
WEIGHTS_WITHOUT_GRADIENT = _check.add(
    "weights-without-gradient",
    "its level weights change the output but get no gradient: the code around the mixer stops gradients "
    "(detach, no_grad, or an autograd.Function)",
    _KEPT,
)
OTHER_IN_TRAINING = _check.add(
    "other-in-training",
    "in training it computes something else, so level weights would not learn: {reason}",
    _KEPT,
)
LEFT_OUT = _check.add(
    "left-out",
    "it was left out of this verification run",
    "nothing: it is in no report",
)
EXAMPLE_RUN = _check.add(
    "example-run",
    "the example run of convert and inspect uses the original code",
    "nothing: it is in no report",
)


def looks_both_ways(code: str) -> bool:
    """Whether it is the code of a mixer that is bidirectional on purpose."""
    return code == BIDIRECTIONAL.code
