"""Names in TORCH_LOGS, and files in TORCH_TRACE."""

from __future__ import annotations

import logging

import pytest
import torch._logging._internal as internal

from llcompile.torch_internals import logs


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, settings = internal.log_registry, f"+{logs.LOG_NAME},{logs.KERNEL_LOG_NAME}"
    monkeypatch.delitem(registry.log_alias_to_log_qnames, logs.LOG_NAME, raising=False)
    monkeypatch.setattr(registry, "artifact_names", registry.artifact_names - {logs.KERNEL_LOG_NAME})
    with pytest.raises(ValueError, match=logs.LOG_NAME):
        internal._parse_log_settings(settings)
    for _ in range(2):  # the second time changes nothing
        logs.register()
        state = internal._parse_log_settings(settings)
        assert state.log_qname_to_level == {logs.LOGGER: logging.DEBUG}
        assert state.is_artifact_enabled(logs.KERNEL_LOG_NAME)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[logging.LogRecord]:
    """What was said to the structured trace."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    monkeypatch.setattr(internal.trace_log, "handlers", [handler])
    monkeypatch.setattr(internal.trace_log, "propagate", False)
    return records


def test_artifact(told: list[logging.LogRecord]) -> None:
    logs.artifact("of_a_test", lambda: "text", "json")
    (record,) = told
    assert record.metadata["artifact"] == {"name": "of_a_test", "encoding": "json"}
    assert record.payload == "text"


def test_no_artifact_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internal.trace_log, "handlers", [])
    logs.artifact("of_a_test", lambda: pytest.fail("made for nobody"))


def test_kernel_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logs.kernel_log()
    try:
        monkeypatch.setenv("TORCH_LOGS", logs.LOG_NAME)
        internal._init_logs()
        assert not log.isEnabledFor(logging.DEBUG)
        monkeypatch.setenv("TORCH_LOGS", logs.KERNEL_LOG_NAME)
        internal._init_logs()
        assert log.isEnabledFor(logging.DEBUG)
        assert logs.kernel_log() is log
    finally:
        monkeypatch.undo()
        internal._init_logs()
