//! What a host can lack.

use bulkhead_harness::Test;

/// The cases.
pub const TESTS: &[Test] = &[];
