//! Holds nothing: the tests are in `tests/rooms.rs`.
