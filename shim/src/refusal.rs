//! A part of a container's description that is refused, by its name.

/// What is refused and why.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {why}")]
pub struct Refusal {
    /// Path of the field, or which mount.
    pub field: String,
    /// What is wrong, or what there is not; and what to do.
    pub why: String,
    /// It may be right, but there is no such thing here.
    pub unsupported: bool,
}

/// Something missing, or a wrong value.
pub fn wrong(field: impl Into<String>, why: impl Into<String>) -> Refusal {
    Refusal {
        field: field.into(),
        why: why.into(),
        unsupported: false,
    }
}

/// Something that asks for what there is not.
pub fn unsupported(field: impl Into<String>, why: impl Into<String>) -> Refusal {
    Refusal {
        field: field.into(),
        why: why.into(),
        unsupported: true,
    }
}
