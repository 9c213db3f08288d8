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
    """Reasons that are found in the same way, in the order in which a person would ask.

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
_WHOLE_PAST = "log-linear attention sees the whole past"
_SCORES = "scores must enter as they are: no square, exponential or softmax; put functions on queries and keys"
_FAMILIES = "compare the code with the recurrences in docs/operator.md"
_GRADIENTS = "leave gradients as they are inside, or do it above its queries, keys, values and gates"
_OUTSIDE = "put it before or behind the mixer: on its queries, keys, values or gates, or on its output"
_LENGTH = "its length varies by mark_dynamic or export: leave it to Dynamo, which adapts"
_PLAIN = "write it without the in-place statement (o = o * 2)"
_LIBRARY = "the call runs the library's own code, so the model is unchanged"
_MOVE_BREAK = "TORCH_LOGS=graph_breaks shows it"
_KEPT = (
    "it runs unchanged, and level weights that it had before are kept; call llcompile.revert(model) to try again with "
    "the next convert"
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
    "use a causal mask: log-linear attention looks back only",
    "a position sees later ones; a bidirectional mixer stays as it is",
)
ROWS_MIXED = _computes.add(
    "rows-mixed",
    "rows are mixed: sequences of a batch, or heads, act on each other",
    "each sequence and head must have a state of its own",
    "states are shared or averaged",
)
# What is summed up.
NOT_LINEAR_IN_VALUE = _computes.add(
    "not-linear-in-value",
    "not linear in the value",
    "the rule applies to outputs that are sums of values: move what is not linear behind the mixer",
    "the output is not a sum of values",
)
STRICTLY_CAUSAL = _computes.add(
    "strictly-causal",
    "strictly causal: a token does not see itself",
    "include the diagonal",
    "the mask leaves the diagonal out, or the state is read before it is written",
)
VALUE_CHANNELS = _computes.add(
    "value-channels",
    "each channel of the value has weights of its own: a decay, gate or rate has the value's axis",
    "decays may belong to heads or to channels of the key",
)
ADDED_TO_SUM = _computes.add(
    "added-to-sum",
    "what is added to its sum is neither a first state nor the token's own value",
    "add it to the output, behind the mixer",
)
STRAY_SOURCE = _computes.add(
    "stray-source",
    "a source acts on single outputs in a way that is not a factor or a sum",
    "move it behind the mixer",
    "something at the output is neither a gate nor a skip",
)
# How it is weighed.
THIRD_POSITION = _computes.add(
    "third-position",
    "the score of two positions depends on a third: that of token {token} on tokens before it",
    "scores may depend on the two positions and, by decays, on what lies between",
    "something between scores and values looks at other tokens",
)
NO_QUERY = _computes.add(
    "no-query",
    "no query: each sequence that meets another acts on later outputs, too",
    "a query acts at its own position only: compute decays and errors from other sources",
)
NO_KEY = _computes.add(
    "no-key",
    "no key: what is read with meets no other sequence",
    "a query meets a key in the state: compute decays and errors from other sources",
)
DECAY_OF_QUERY = _computes.add(
    "decay-of-query",
    "the weights of the past depend on another sequence at the position that reads (a decay of the query)",
    "a decay belongs to the positions that it passes, not to the one that reads",
)
SOFTMAX_SCORES = _computes.add(
    "softmax-scores",
    "not linear in the query: scores pass through a softmax",
    "the code runs as it is: softmax attention is no linear-time mixer",
    "softmax attention that got no other name",
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
    "normalise by the same scores",
    "the output is divided by something else that is summed over queries, keys or values",
)
COMPARES_VALUES = _computes.add(
    "compares-values",
    "what it does depends on comparisons of values",
    "a top-k, a threshold or buckets leave tokens out; log-linear attention sees the whole past",
)
# What becomes of a weight with time.
SLIDING_WINDOW = _computes.add(
    "sliding-window",
    "its reach ends: output {output} does not depend on input {input} any more (a window or a reset)",
    _WHOLE_PAST,
    "old tokens are dropped",
)
SKIPPED_TOKENS = _computes.add(
    "skipped-tokens",
    "not every earlier token counts: output {output} does not depend on input {input}",
    _WHOLE_PAST,
    "scores of some pairs are zero",
)
DECAY_NOT_A_PRODUCT = _computes.add(
    "decay-not-a-product",
    "its decay is not a product of one factor for each token",
    "decays multiply: one factor for each token (and head, or channel of the key)",
    "a bias by distance, a power law",
)
OWN_WEIGHT = _computes.add(
    "own-weight",
    "a token's own weight is not the one that its decays give",
    "take it out of the mixer; decays multiply: one factor for each token (and head, or channel of the key)",
    "a bonus, or a decay that is late by one",
)
OTHER_ERASE_KEY = _computes.add(
    "other-erase-key",
    "what a token erases is not along its own key",
    "a delta rule erases along the key that it writes to",
    "two keys, or an erase on the value's side",
)
# What it is then.
UNKNOWN_SCORES = _computes.add(
    "unknown-scores",
    "its scores are not those of a known family",
    _FAMILIES,
    "queries, keys and values were found, but the operator on them gives something else",
)
NEAR_A_FAMILY = _computes.add(
    "near-a-family",
    "agrees at w = 1 to {error:.0e} only",
    _FAMILIES,
    "the nearest family comes this close, and that is not enough",
)
PROOF_FAILED = _computes.add(
    "proof-failed",
    "agrees at w = 1 to {error:.0e} only (at length {length})",
    "look for what depends on the length; docs/recognition.md describes the proof",
    "a reading was found and failed its proof at that length",
)
GRADIENTS_DIFFER = _computes.add(
    "gradients-differ",
    "its gradients differ from the operator's by {error:.0e}",
    "the code runs as it is; take what stops or changes a gradient out of the mixer",
)

_inside = _group(
    "Hand-written mixers: what stands inside",
    "The code is a mixer but for something in it: what changes a gradient or a dtype, what no proof can cover, what "
    "depends on the length, or a statement in place. See [recognition.md](recognition.md#in-place-statements).",
)
NO_GRAD = _inside.add(
    "no-grad",
    "it runs under torch.no_grad(): level weights could not learn",
    _AS_IT_IS,
    "all of it stands in a region without gradients",
)
NO_GRAD_INSIDE = _inside.add(
    "no-grad-inside", "a part of it runs under torch.no_grad(){at}", "have all of it in one mode"
)
AUTOCAST_INSIDE = _inside.add(
    "autocast-inside",
    "autocast changes inside{at}",
    "have all of it inside of one autocast region",
    "one part of it runs in 16 bits and another does not",
)
GRADIENT_STOPPED = _inside.add("gradient-stopped", "its gradient is stopped inside (detach){at}", _GRADIENTS)
FUNCTION_INSIDE = _inside.add("function-inside", "a function inside has a backward of its own{at}", _GRADIENTS)
UNKNOWN_BACKWARD = _inside.add(
    "unknown-backward",
    "what the backward of {operation} is, is not known{at}",
    _GRADIENTS,
    "a custom operation of torch.library stands inside",
)
OWN_BACKWARD = _inside.add(
    "own-backward",
    "it stands in an autograd.Function whose backward is not the gradient of its forward",
    "call the mixer outside of the Function, so that its level weights have a gradient",
)
RANDOM = _inside.add("random", "its {operation} ({where}) is random", _OUTSIDE, "dropout on the scores")
ROUNDING = _inside.add("rounding", "its {operation} ({where}) rounds to {dtype}", _OUTSIDE)
UNKNOWN_OPERATION = _inside.add(
    "unknown-operation",
    "its {operation} ({where}) is not an operation that a proof by random draws can cover",
    _OUTSIDE,
    "an operation that stands in no table (grammar.py)",
)
ACTS_INSIDE = _inside.add(
    "acts-inside",
    "its {operation} ({where}) acts on numbers that the code may meet",
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
    "its decay is a parameter with numbers from {low:.3g} to {high:.3g}",
    "keep it in (0, 1], by a sigmoid for example",
    "a parameter taken as it is, beyond (0, 1]",
)
SHORT_EXAMPLE = _inside.add(
    "short-example",
    "its {operation} of positions ({where}) does nothing at length {length}",
    "give an example that is longer than every window, block or bucket of the code",
    "what has not happened at any position so far would happen further on",
)
OTHER_LENGTHS = _inside.add("other-lengths", "its {operation} ({where}) may differ at other lengths", _LENGTH)
ONE_LENGTH = _inside.add(
    "one-length",
    "it is a mixer at length {length}, not at {other}",
    _LENGTH,
    "the length must vary, and the part is known at one only",
)
CLOSED_BODY = _inside.add(
    "closed-body",
    "it stands in the body of {operation}, which takes no further operands",
    "move the mixer out of the control flow, or compile the part inside by itself",
)
OPERAND_CHANGED = _inside.add(
    "operand-changed", "an operand is changed in place while it is read", "write the changed operand anew"
)
OPERAND_LOST = _inside.add(
    "operand-lost",
    "no node before its end returns one of its operands",
    "name the operand in a statement",
)
OUTPUT_OUTLIVES = _inside.add(
    "output-outlives",
    "its output is written into a tensor that is there before and after the call (an input, a buffer)",
    "compute the output in a tensor of its own, and copy it",
)
COMPUTED_TWICE = _inside.add("computed-twice", "it is computed twice, and one is changed in place at {where}", _PLAIN)
OUTPUT_CHANGED = _inside.add(
    "output-changed",
    "its output is changed in place at {where}, and read through a view made before it",
    _PLAIN,
)

_ends = _group(
    "Hand-written mixers: where the search ends",
    "Queries and keys meet here, and what follows could not be looked at.",
)
TOO_MANY_OPERANDS = _ends.add(
    "too-many-operands",
    "the search stops at {most} operands, and it is computed from {count} tensors",
    "compute what the steps of a loop read for all tokens at once, before the loop",
    "a loop reads a tensor of its own in each step",
)
PIECE_OF_SEQUENCE = _ends.add(
    "piece-of-sequence",
    "it mixes a piece of its sequence by itself ({tokens} tokens)",
    "log-linear attention counts positions from the start: mix all of the sequence, or compile the piece by itself",
    "a chunk is mixed, and other chunks are not mixed with it",
)
UNKNOWN_ON_SCORES = _ends.add(
    "unknown-on-scores",
    "scores pass through {operation}, which is not known",
    "write it in operations of torch",
    "a custom operation stands between the scores and the values",
)
ANALYSIS_FAILED = _ends.add(
    "analysis-failed",
    "llcompile failed to analyse it: {error}",
    "the code runs unchanged; please report it with the log of TORCH_LOGS=+loglinear",
    "an exception of llcompile's own",
)

_unlike = _group(
    "Not similar to a mixer",
    "Most values of a model are like that. They are not in the report, unless something else brings the code near a "
    "mixer; `TORCH_LOGS=+loglinear` shows them, one line for each cut that was tried.",
)
FEW_SEQUENCES = _unlike.add("few-sequences", "it has fewer than two sequences to mix", _AS_IT_IS)
NOT_CONTRACTED = _unlike.add("not-contracted", "no query and key: nothing is contracted", _AS_IT_IS)
NOT_ALL_OF_TIME = _unlike.add("not-all-of-time", "it does not have all of time", _AS_IT_IS)
RESIDUAL = _unlike.add(
    "residual",
    "it adds a mixer's output to what that was computed from; each mixer is looked at by itself",
    _AS_IT_IS,
)
TWO_QUERIES = _unlike.add("two-queries", "two sources act as queries", _AS_IT_IS)
NOT_LINEAR = _unlike.add("not-linear", "not linear in the query, nor in a value", _AS_IT_IS)
IDLE_SOURCE = _unlike.add("idle-source", "its result does not depend on one of its sources", _AS_IT_IS)
NOT_FINITE = _unlike.add("not-finite", "it has no finite result on generic numbers", _AS_IT_IS)
WHOLE_NUMBERS = _unlike.add("whole-numbers", "it depends on whole numbers or masks of the input", _AS_IT_IS)
TOO_LARGE = _unlike.add(
    "too-large", "it is computed from more tensors, by more operations, than are looked at", _AS_IT_IS
)
NOT_RUN = _unlike.add("not-run", "it does not run by itself: {error}", _AS_IT_IS)
OPERAND_TOO_LARGE = _unlike.add(
    "operand-too-large", "an operand that mixes positions is too large to be looked at", _AS_IT_IS
)
OPERAND_NOT_RUN = _unlike.add(
    "operand-not-run", "an operand that mixes positions does not run by itself: {error}", _AS_IT_IS
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
    "argument-unknown", "argument {argument} of {function} is set, and its meaning is not in the table", _LIBRARY
)
ARGUMENT_SHAPE = _known.add(
    "argument-shape", "argument {argument} of {function} has shape {shape}, expected {expected} ({axes})", _LIBRARY
)
ARGUMENT_VARIES = _known.add(
    "argument-varies",
    "argument {argument} of {function} has shape {shape} and differs along {axis}, where the family has one value per "
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
    "idle-operand", "its result does not depend on {operand}, so agreement would prove nothing", _LIBRARY
)
FUNCTION_DIFFERS = _known.add(
    "function-differs",
    "agrees{against} at w = 1 to {error:.0e} only, where {bound:.0e} is the bound",
    _LIBRARY,
    "the installed function is not what its entry says",
)

# ---- states

_states = _group("States and single tokens", "The mixer was found, and a state or a single token stands in the way.")
LINEAR_STATE = _states.add(
    "linear-state",
    "a state without levels came in: its output reads the past through it, which level weights do not reach",
    "run the whole sequence in one call, without a state, or use level_weights='none'",
)
STATE_WITHOUT_PLACE = _states.add(
    "state-without-place",
    "its state has no levels and is computed by the model, so there is no place to keep levels",
    "prefill through the compiled model, without a state",
)
ONE_TOKEN_NOT_LINEAR = _states.add(
    "one-token-not-linear",
    "its output for one token is not linear in its values: a state came in, or something else is added to it",
    "call it with two tokens or more",
)
ONE_TOKEN_CHANGED = _states.add(
    "one-token-changed",
    "its output for one token is changed in place, or written into another tensor",
    "call it with two tokens or more",
)

# ---- level weights

_weights = _group("Level weights", "The mixer was found, and level weights cannot be given to it or read.")
NO_OWNER = _weights.add(
    "no-owner",
    "its module cannot be reached from the compiled frame, so it has no place for level weights",
    f"a graph break above this line splits the module's forward; {_MOVE_BREAK}",
)
CUT_OFF_INPUT = _weights.add(
    "cut-off-input",
    "a graph break stands between its projections and its mixing, and what its level weights read is not in this graph",
    f"move what breaks the graph (a hook, .item(), a print) out of the module; {_MOVE_BREAK}",
)
OTHER_INPUT = _weights.add(
    "other-input",
    "what its level weights read when they were made is not what its operands are projected from in this graph",
    "run the same code as in convert, or call llcompile.revert(model) and convert the model again",
)
AMBIGUOUS_WEIGHTS = _weights.add(
    "ambiguous-weights",
    "its module has several level weights, and it is not clear which of them belong to it",
    f"a graph break stands inside of the mixer; {_MOVE_BREAK}",
)
AMBIGUOUS_CHECKPOINT = _weights.add(
    "ambiguous-checkpoint",
    "its module has several level weights from a checkpoint, and it is not clear which of them belong to it",
    "fewer mixers run here than the checkpoint has level weights for; convert the model again",
)
WEIGHTS_ON_META = _weights.add(
    "weights-on-meta",
    "its level weights are on the device meta: the offloading of the model does not load them",
    "keep the modules named loglinear out of the offloading",
)
WEIGHTS_OUT_OF_REACH = _weights.add(
    "weights-out-of-reach",
    "its level weights cannot be read in this frame: {error}",
    "compile the model as a whole",
)
NOT_EXPORTED = _weights.add(
    "not-exported",
    "it has no level weights, and an export adds none",
    "call llcompile.convert(model, *example_inputs) with inputs like those of the export",
)

# ---- the conversion's check

_check = _group(
    "The check of a conversion",
    "`convert` has run the converted model on the example inputs and compared it with the model's own run.",
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
    "rewrite-not-run", "the rewritten program does not run on the example inputs: {error}", _KEPT
)
WEIGHTS_IDLE = _check.add(
    "weights-idle",
    "noise on its level weights does not change what the model returns: nothing that is returned depends on the mixer, "
    "or the compiled program does not read its level weights",
    _KEPT,
)
WEIGHTS_WITHOUT_GRADIENT = _check.add(
    "weights-without-gradient",
    "its level weights change the output and get no gradient: the program around the mixer stops gradients "
    "(detach, no_grad, or an autograd.Function of its own)",
    _KEPT,
)
OTHER_IN_TRAINING = _check.add(
    "other-in-training",
    "in training it is another program, so that level weights would not learn: {reason}",
    _KEPT,
)
LEFT_OUT = _check.add(
    "left-out",
    "it is left out of this run of the conversion's check",
    "nothing: it is in no report",
)
EXAMPLE_RUN = _check.add(
    "example-run",
    "the example run of convert and inspect uses the model's own code",
    "nothing: it is in no report",
)
