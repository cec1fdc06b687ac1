//! What containerd has on record, asked of its gRPC services. All of them answer `List` with items whose first field is a
//! name, so that one message reads them all (containerd's `api/services`).

use std::{path::Path, time::Duration};

use tonic::{
    Code, Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use crate::failure::{Context, Outcome};

/// What is listed, and the method that does.
const LISTS: [(&str, &str); 4] = [
    (
        "container",
        "/containerd.services.containers.v1.Containers/List",
    ),
    ("lease", "/containerd.services.leases.v1.Leases/List"),
    (
        "snapshot",
        "/containerd.services.snapshots.v1.Snapshots/List",
    ),
    // Of containerd 2.
    ("sandbox", "/containerd.services.sandbox.v1.Store/List"),
];
/// containerd answers at once or never.
const LIMIT: Duration = Duration::from_secs(60);

/// `ListSnapshotsRequest`; the others' requests are empty or have filters alone.
#[derive(Clone, PartialEq, prost::Message)]
struct Ask {
    #[prost(string, tag = "1")]
    snapshotter: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct List {
    #[prost(message, repeated, tag = "1")]
    items: Vec<Item>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Item {
    #[prost(string, tag = "1")]
    name: String,
}

/// One line a record in `namespace`.
pub fn records(socket: &Path, namespace: &str) -> Outcome<Vec<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a runtime")?;
    let address = format!("unix://{}", socket.display());
    let endpoint = Endpoint::from_shared(address).context("containerd's address")?;
    runtime.block_on(async {
        let channel = endpoint.connect().await.context("connect to containerd")?;
        let mut records = Vec::new();
        for (kind, method) in LISTS {
            let names = match list(&channel, namespace, method).await {
                Err(status) if status.code() == Code::Unimplemented => continue,
                names => names.context(method)?,
            };
            records.extend(
                names
                    .iter()
                    .map(|name| format!("{kind} {name} in {namespace}")),
            );
        }
        Ok(records)
    })
}

/// Snapshots come as a stream, and one answer is a stream of one.
async fn list(
    channel: &Channel,
    namespace: &str,
    method: &'static str,
) -> Result<Vec<String>, Status> {
    let mut client = Grpc::new(channel.clone());
    client
        .ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let mut request = Request::new(Ask {
        snapshotter: match method.contains("Snapshots") {
            true => "overlayfs".into(),
            false => String::new(),
        },
    });
    let value = MetadataValue::try_from(namespace)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    request.metadata_mut().insert("containerd-namespace", value);
    request.set_timeout(LIMIT);
    let codec = ProstCodec::<Ask, List>::default();
    let path = PathAndQuery::from_static(method);
    let mut answers = client
        .server_streaming(request, path, codec)
        .await?
        .into_inner();
    let mut names = Vec::new();
    while let Some(answer) = answers.message().await? {
        names.extend(answer.items.into_iter().map(|item| item.name));
    }
    Ok(names)
}
