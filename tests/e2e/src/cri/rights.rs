//! Who a container's processes are, and what they may.

use bulkhead_cri::{
    Cri, Int64Value, SecurityProfile,
    container::{security, shell},
};
use bulkhead_harness::{Outcome, Suite, Test, ensure, ensure_eq, runner::ANY, test};

use super::IMAGES;
use crate::cri;

/// The cases of this file.
pub const TESTS: &[Test] = &[
    test!(cri::rights::are_those_of_the_security_context, IMAGES, ANY)
        .cri()
        .fast_host(),
];

const IDLE: &str = "exec sleep 1000000";

fn are_those_of_the_security_context(suite: &Suite) -> Outcome {
    let cri = Cri::connect(suite, IMAGES)?;
    let mut config = cri.config("rights");
    let linux = config.linux.get_or_insert_default();
    for (key, value) in [
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("kernel.shm_rmid_forced", "1"),
    ] {
        linux.sysctls.insert(key.into(), value.into());
    }
    let pod = cri.run(config)?;

    let mut strict = shell("strict", IDLE);
    let may = security(&mut strict);
    may.run_as_user = Some(Int64Value { value: 1000 });
    may.run_as_group = Some(Int64Value { value: 3000 });
    may.supplemental_groups = vec![4000, 5000];
    may.readonly_rootfs = true;
    may.no_new_privs = true;
    // 0 is RuntimeDefault.
    may.seccomp = Some(SecurityProfile::default());
    let strict = pod.launch(strict)?;
    let said = pod.exec(&strict, &["id"])?.stdout;
    ensure!(
        said.contains("uid=1000") && said.contains("gid=3000"),
        "{said}"
    );
    ensure!(
        said.contains("4000") && said.contains("5000"),
        "groups: {said}"
    );
    let said = pod.exec(&strict, &["touch", "/tmp/x"])?;
    ensure!(said.stderr.contains("Read-only file system"), "{said:?}");
    let status = pod.sh(
        &strict,
        "grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/self/status",
    )?;
    let words: Vec<&str> = status.split_whitespace().collect();
    let expected = [
        "CapEff:",
        "0000000000000000",
        "NoNewPrivs:",
        "1",
        "Seccomp:",
        "2",
    ];
    ensure_eq!("status", words, expected);
    let said = pod.exec(&strict, &["unshare", "-U", "true"])?;
    ensure!(
        said.code != 0,
        "the default profile lets a user namespace be made"
    );
    let sysctls =
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced";
    ensure_eq!("sysctls", pod.sh(&strict, sysctls)?, "80\n1");

    // Another container of the pod has its own.
    let loose = pod.launch(shell("loose", IDLE))?;
    ensure_eq!("user", pod.sh(&loose, "id -u; touch /x")?, "0");
    ensure_eq!(
        "filter",
        pod.sh(&loose, "grep ^Seccomp: /proc/self/status")?,
        "Seccomp:\t0"
    );
    pod.end()
}
