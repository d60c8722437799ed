//! What is shown of holes in a file below an image's data, beside the installed qemu-img.

use crate::beside::same;

#[test]
fn holes_are_zeros_where_qemu_looks_for_them() {
    let made = [
        ("vpc", "-o subformat=fixed", "f.vpc"),
        ("vpc", "", "d.vpc"),
        ("vdi", "-o static=on", "f.vdi"),
        ("vdi", "", "d.vdi"),
        ("vmdk", "-o subformat=monolithicFlat", "f.vmdk"),
        ("vmdk", "", "d.vmdk"),
        ("qcow2", "-o preallocation=metadata", "f.qcow2"),
        ("qcow2", "-o preallocation=falloc", "a.qcow2"),
        (
            "qcow2",
            "-o cluster_size=512,preallocation=metadata",
            "s.qcow2",
        ),
        ("qcow2", "", "d.qcow2"),
        (
            "qcow2",
            "-o data_file=raw,data_file_raw=on,preallocation=metadata",
            "x.qcow2",
        ),
        ("qed", "", "d.qed"),
        ("qcow", "", "d.qcow"),
        ("parallels", "", "d.parallels"),
    ];
    let mut lines = Vec::new();
    for (format, options, name) in made {
        // By QEMU's on both sides: where the data are in the file is its maker's business.
        lines.push(format!(
            "env qemu-img create -q -f {format} {options} {name} 16M"
        ));
        lines.push(format!(
            "qemu-io -f {format} -c write_-q_-P_5_2M_64k -c write_-q_-P_5_6M_1M {name}"
        ));
        lines.push(format!(
            "qemu-img map --start-offset=1M --max-length=8M --output=json {name}"
        ));
        lines.push(format!(
            "qemu-img map --start-offset=1M --max-length=8M {name}"
        ));
        lines.push(format!("qemu-img info {name}"));
    }
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}
