//! The proxies are what the XML says. `CASEMATE_WRITE_PROXIES=1` (`make interfaces`) writes them anew.

use std::path::Path;

use zbus_xml::Node;
use zbus_xmlgen::CodeGenerator;

#[test]
fn proxies_are_generated_from_the_xml() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    for entry in std::fs::read_dir(directory).expect("interfaces") {
        let path = entry.expect("entry").path();
        if path.extension().is_none_or(|extension| extension != "xml") {
            continue;
        }
        let node = Node::from_reader(std::fs::File::open(&path).expect("XML")).expect("good XML");
        let file = path.file_name().and_then(|name| name.to_str()).expect("name");
        let code = CodeGenerator::new()
            .file_code(node.interfaces(), &[], file, "make interfaces", "")
            .expect("code")
            .replace("` ``", "`");
        let member = file.rsplit('.').nth(1).expect("member").to_lowercase();
        let proxy = directory.join("src/proxies").join(format!("{member}.rs"));
        if std::env::var_os("CASEMATE_WRITE_PROXIES").is_some() {
            std::fs::write(&proxy, &code).expect("write");
        }
        let checked_in = std::fs::read_to_string(&proxy).unwrap_or_default();
        assert_eq!(checked_in, code, "{} is not what {file} says: run `make interfaces`", proxy.display());
    }
}
