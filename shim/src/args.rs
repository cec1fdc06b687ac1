//! The command line of a runtime v2 shim: Go-style flags (`-id x`, `-id=x`, `--id x`), then the action.

/// What containerd passes on the command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the container.
    pub id: String,
    /// Address of containerd's main socket.
    pub address: String,
    /// containerd's binary: `publish` sends an event.
    pub publish_binary: String,
    /// Path of the bundle (`delete` only).
    pub bundle: String,
    /// Accepted and not used: the keeper knows its socket.
    pub socket: String,
    /// More log lines.
    pub debug: bool,
    /// Print the version.
    pub version: bool,
    /// Print the runtime's information as protobuf.
    pub info: bool,
    /// `start`, `delete`, empty for the daemon, or the keeper's word for a worker.
    pub action: String,
}

/// Why a command line was not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A flag nobody knows.
    #[error("unknown flag -{0}")]
    UnknownFlag(String),
    /// The value is missing.
    #[error("flag -{0} needs a value")]
    NoValue(String),
    /// More than one action.
    #[error("unexpected argument {0:?}")]
    Unexpected(String),
}

impl Args {
    /// Parses the arguments after the program's name.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, Error> {
        let mut out = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix('-') else {
                if !out.action.is_empty() {
                    return Err(Error::Unexpected(arg));
                }
                out.action = arg;
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let truth = |value: Option<String>| value.is_none_or(|v| v == "true" || v == "1");
            match name {
                "debug" => out.debug = truth(value),
                "v" | "version" => out.version = truth(value),
                "info" => out.info = truth(value),
                _ => {
                    let target = match name {
                        "namespace" => &mut out.namespace,
                        "id" => &mut out.id,
                        "address" => &mut out.address,
                        "publish-binary" => &mut out.publish_binary,
                        "bundle" => &mut out.bundle,
                        "socket" => &mut out.socket,
                        _ => return Err(Error::UnknownFlag(name.to_owned())),
                    };
                    *target = value
                        .or_else(|| args.next())
                        .ok_or_else(|| Error::NoValue(name.to_owned()))?;
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Error> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_line_containerd_uses_is_understood() {
        let args = parse(
            "-namespace default -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id web -debug start",
        )
        .unwrap();
        assert_eq!(
            (args.namespace.as_str(), args.id.as_str()),
            ("default", "web")
        );
        assert_eq!(args.publish_binary, "/usr/bin/containerd");
        assert!(args.debug);
        assert_eq!(args.action, "start");
    }

    #[test]
    fn equals_signs_and_double_dashes_are_the_same() {
        let args = parse("--id=web -bundle=/b --debug=false delete").unwrap();
        assert_eq!((args.id.as_str(), args.bundle.as_str()), ("web", "/b"));
        assert!(!args.debug);
    }

    #[test]
    fn unknown_flags_and_missing_values_are_errors() {
        assert_eq!(parse("-x 1"), Err(Error::UnknownFlag("x".into())));
        assert_eq!(parse("-id"), Err(Error::NoValue("id".into())));
        assert_eq!(parse("start more"), Err(Error::Unexpected("more".into())));
    }
}
