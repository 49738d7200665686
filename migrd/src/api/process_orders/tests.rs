use super::*;

fn order(argv: &[&str]) -> proto::ExecProcessRequest {
    proto::ExecProcessRequest {
        name: "p".into(),
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        ..Default::default()
    }
}

fn in_network(address: &str, bridge: &str, gateway: &str, mac: &[u8]) -> proto::ExecProcessRequest {
    let net = proto::ProcessNet {
        address: address.into(),
        bridge: bridge.into(),
        gateway: gateway.into(),
        mac: mac.to_vec().into(),
    };
    proto::ExecProcessRequest { net: Some(net), ..order(&["sleep", "9"]) }
}

fn refused(order: &proto::ExecProcessRequest) -> Senseless {
    config(order).expect_err("it makes no sense")
}

#[test]
fn a_command_alone_gets_the_root_directory_and_a_path() {
    let made = config(&order(&["sleep", "9"])).unwrap();
    let whole = proto::ProcessConfig {
        container: None,
        version: 1,
        argv: vec!["sleep".into(), "9".into()],
        env: vec![DEFAULT_PATH.into()],
        cwd: "/".into(),
        net: None,
        adopted: 0,
    };
    assert_eq!(made, whole);
}

#[test]
fn a_path_that_is_ordered_is_the_only_one() {
    let env = vec!["A=1=2".to_owned(), "PATH=/opt/bin".to_owned(), "B=".to_owned()];
    let made = config(&proto::ExecProcessRequest { env: env.clone(), ..order(&["x"]) }).unwrap();
    assert_eq!(made.env, env);
}

#[test]
fn a_command_has_words_that_a_program_can_be_given() {
    assert_eq!(refused(&order(&[])), Senseless::NoCommand);
    assert_eq!(refused(&order(&["", "x"])), Senseless::NoProgram);
    assert!(refused(&order(&["x", "a\0b"])).to_string().contains("argument 1"));
    let longest = "a".repeat(MAX_STRING);
    assert!(config(&order(&["x", &longest, ""])).is_ok());
    let too_long = format!("{longest}a");
    assert!(matches!(refused(&order(&["x", &too_long])), Senseless::String { .. }));
}

#[test]
fn what_is_ordered_fits_into_an_offer() {
    let word = "a".repeat(100 << 10);
    assert!(config(&order(&[word.as_str(); 10])).is_ok());
    assert_eq!(refused(&order(&[word.as_str(); 11])), Senseless::TooLong);
    let many = vec!["a"; MAX_CONFIG / 3 + 1];
    assert_eq!(refused(&order(&many)), Senseless::TooLong);
}

#[test]
fn variables_have_a_name_once() {
    let with = |env: &[&str]| proto::ExecProcessRequest {
        env: env.iter().map(|&variable| variable.to_owned()).collect(),
        ..order(&["x"])
    };
    for odd in ["A", "=1", ""] {
        assert_eq!(refused(&with(&[odd])), Senseless::Variable(odd.into()));
    }
    assert_eq!(refused(&with(&["A=1", "B=", "A=2"])), Senseless::Twice("A".into()));
    assert!(matches!(refused(&with(&["A=\0"])), Senseless::String { .. }));
    let secret = refused(&with(&["correct horse battery staple"])).to_string();
    assert!(!secret.contains("staple"), "{secret}");
}

#[test]
fn the_directory_is_absolute() {
    let at = |cwd: &str| proto::ExecProcessRequest { cwd: cwd.into(), ..order(&["x"]) };
    assert_eq!(config(&at("/srv/app")).unwrap().cwd, "/srv/app");
    for odd in ["srv", "./srv", "~/srv", "/a\0b"] {
        assert_eq!(refused(&at(odd)), Senseless::Directory(odd.into()));
    }
    assert!(matches!(refused(&at(&format!("/{}", "a".repeat(4095)))), Senseless::Directory(_)));
}

#[test]
fn an_address_of_a_host_comes_with_its_prefix() {
    let mac = [2, 0, 0, 0, 0, 7];
    let made = config(&in_network("10.0.0.5/24", "br0", "10.0.0.1", &mac)).unwrap().net.unwrap();
    assert_eq!((made.address.as_str(), made.gateway.as_str()), ("10.0.0.5/24", "10.0.0.1"));
    assert_eq!((made.bridge.as_str(), made.mac.as_ref()), ("br0", &mac[..]));
    let six = config(&in_network("FD00:1:0::5/064", "br0", "fe80::1", &[])).unwrap().net.unwrap();
    assert_eq!((six.address.as_str(), six.gateway.as_str()), ("fd00:1::5/64", "fe80::1"));
    for odd in [
        "",
        "10.0.0.5",
        "10.0.0.5/",
        "10.0.0.5/33",
        "10.0.0.5/0",
        "10.0.0.5/+24",
        "10.0.0/24",
        "fd00::1/129",
        "::ffff:10.0.0.5/120",
        "10.0.0.5/24/24",
        "host/24",
        " 10.0.0.5/24",
    ] {
        let order = in_network(odd, "br0", "", &[]);
        assert_eq!(refused(&order), Senseless::Address(odd.into()), "{odd}");
    }
    for nobody in ["0.0.0.0/8", "127.0.0.1/8", "224.0.0.1/4", "255.255.255.255/32", "::1/128"] {
        let found = refused(&in_network(nobody, "br0", "", &[]));
        assert!(matches!(found, Senseless::NoHost(_)), "{nobody}: {found}");
    }
}

#[test]
fn a_bridge_is_named_as_linux_names_interfaces() {
    for name in ["br0", "br-lan.7", "a23456789012345"] {
        assert!(config(&in_network("10.0.0.5/24", name, "", &[])).is_ok(), "{name}");
    }
    for name in ["", ".", "..", "br/0", "br:0", "br 0", "br\u{e9}", "a234567890123456", "b\n"] {
        let order = in_network("10.0.0.5/24", name, "", &[]);
        assert_eq!(refused(&order), Senseless::Bridge(name.into()));
    }
}

#[test]
fn a_gateway_is_in_the_network_and_another_host() {
    for odd in ["10.0.1.1", "10.0.0.5", "fd00::1", "gateway", "10.0.0.1/24"] {
        let found = refused(&in_network("10.0.0.5/24", "br0", odd, &[]));
        assert_eq!(found, Senseless::Gateway(odd.into(), "10.0.0.5/24".into()));
    }
}

#[test]
fn a_hardware_address_is_that_of_one_interface() {
    for odd in
        [&[2, 0, 0, 0, 0][..], &[2, 0, 0, 0, 0, 1, 2], &[3, 0, 0, 0, 0, 1], &[0; 6], &[255; 6]]
    {
        assert_eq!(refused(&in_network("10.0.0.5/24", "br0", "", odd)), Senseless::Mac, "{odd:?}");
    }
}

#[test]
fn what_makes_no_sense_is_an_invalid_argument_of_this_host() {
    let status = process("a:1", &order(&[])).unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("after `--`"), "{}", status.message());
}
